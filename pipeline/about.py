"""What only people know of a dataset."""

from cluster.config import Config, key


class AboutConfig(Config):
    """What the dataset card and croissant.json say beside what the build knows."""

    name: str = key("image-text pairs", "what the dataset is called", affects_result=False, min_length=1)
    about: str = key("", "a sentence or two on what it is for", affects_result=False)
    license: str = key(
        "unknown",
        "licence of the collection, as Hugging Face names it, such as cc-by-4.0; images keep their own",
        affects_result=False,
        min_length=1,
    )
    url: str | None = key(None, "where it can be found", affects_result=False)
