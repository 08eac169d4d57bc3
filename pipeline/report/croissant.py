"""`OUT/croissant.json`: the dataset in Croissant 1.0 (mlcommons.org/croissant/1.0), which tools for datasets read.

The record set `samples` has the columns of the shards' parquet files. Images are in the tar files, where `image_offset`
and `image_size` say: Croissant has no field for that. The hash of each file stands in manifest.json, which is named
with its own.
"""

import hashlib
import json
import re
from typing import Any

from pipeline.about import AboutConfig
from pipeline.manifest import MANIFEST_FILE, Manifest

CROISSANT_FILE = "croissant.json"
COLUMNS = {
    "key": "basename of the sample's files in its tar",
    "uid": "128-bit hash of URL and caption, 32 hex digits",
    "url": "where the image was downloaded",
    "caption": "the text beside the image in the list",
    "width": "of the stored image, pixels",
    "height": "of the stored image, pixels",
    "original_width": "of the image as downloaded and upright, pixels",
    "original_height": "of the image as downloaded and upright, pixels",
    "sha256": "of the bytes as downloaded",
    "phash": "64-bit perceptual hash of the stored image",
    "phash_mirror": "64-bit perceptual hash of its mirror image",
    "sharpness": "variance of the Laplacian at a fixed size",
    "image_format": "jpg, png or webp: also the extension in the tar",
    "image_offset": "where the image's bytes begin in the tar",
    "image_size": "bytes of the image in the tar",
    "caption_offset": "where the caption's bytes begin in the tar",
    "caption_size": "bytes of the caption in the tar",
    "source": "the source of the configuration that the pair comes from",
    "captions": "captions of duplicates that this sample represents",
}
"""What columns are, for people; others came with the lists."""

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_TYPES = (
    (r"(large_)?string", "sc:Text"),
    (r"u?int\d+", "sc:Integer"),
    (r"halffloat|float|double|decimal.*", "sc:Float"),
    (r"bool", "sc:Boolean"),
    (r"date.*|timestamp.*", "sc:Date"),
)


def croissant_json(manifest: Manifest, said: AboutConfig) -> bytes:
    """The file's bytes: a function of the manifest and of what is said of the dataset."""
    samples = {
        "@type": "cr:RecordSet",
        "@id": "samples",
        "name": "samples",
        "description": "One record a sample, in the order of the shards.",
        "key": {"@id": "samples/uid"},
        "field": [_field(name, kind) for name, kind in manifest.columns.items()],
    }
    content = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": said.name,
        "description": said.about or f"{manifest.num_samples:,} image-text pairs built by pairmill.",
        "license": said.license,
        **({"url": said.url} if said.url else {}),
        "distribution": [_manifest_file(manifest), *_file_sets(manifest)],
        "recordSet": [samples],
    }
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def _manifest_file(manifest: Manifest) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": "manifest",
        "name": MANIFEST_FILE,
        "description": "sizes and sha256 of all files, settings, sources, and counts by reason",
        "contentUrl": MANIFEST_FILE,
        "encodingFormat": "application/json",
        "sha256": hashlib.sha256(manifest.to_json()).hexdigest(),
    }


def _file_sets(manifest: Manifest) -> list[dict[str, Any]]:
    count = f"{len(manifest.shards):,} shards"
    return [
        _file_set("tables", "application/x-parquet", "shards/*.parquet", f"{count}: what is known of each sample"),
        _file_set("archives", "application/x-tar", "shards/*.tar", f"{count}: images and captions in webdataset form"),
    ]


def _file_set(name: str, encoding: str, includes: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "description": description,
        "encodingFormat": encoding,
        "includes": includes,
    }


def _field(name: str, kind: str) -> dict[str, Any]:
    inner = re.fullmatch(r"(?:large_|fixed_size_)?list<\w+: (.*?)(?: not null)?>(?:\[\d+\])?", kind)
    return {
        "@type": "cr:Field",
        "@id": f"samples/{name}",
        "name": name,
        "description": COLUMNS.get(name, "as in the lists"),
        "dataType": data_type(inner[1] if inner else kind),
        **({"repeated": True} if inner else {}),
        "source": {"fileSet": {"@id": "tables"}, "extract": {"column": name}},
    }


def data_type(kind: str) -> str:
    """Croissant's name for an Arrow type; what it has no name for is text."""
    return next((name for pattern, name in _TYPES if re.fullmatch(pattern, kind)), "sc:Text")
