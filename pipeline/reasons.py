"""Why a row is not in the dataset: one name per reason, the same in records, counts, reports and `explain`.

Open-ended are `http_<status>`, such as `http_404`, of rows whose server answered with an error, and `rule_<reason>` of
those that one of the user's own rules drops.
"""

from enum import StrEnum

USER_REASON = "rule_"


class Reason(StrEnum):
    """A reason, its sentence for people, and whether trying again later may help."""

    sentence: str
    transient: bool

    def __new__(cls, name: str, sentence: str = "", transient: bool = False) -> "Reason":
        reason = str.__new__(cls, name)
        reason._value_ = name
        reason.sentence = sentence
        reason.transient = transient
        return reason

    # Before the download.
    UNREADABLE_ROW = (
        "unreadable_row",
        "the list's row could not be read: bad bytes or the wrong number of fields",
    )
    IMPORT_FAILED = "import_failed", "the dataset that it comes from had failed to get the image"
    IMPORT_MISSING = (
        "import_missing",
        "the image is not in the file where the dataset that it comes from should have it",
    )
    IMPORT_UNLISTED = "import_unlisted", "the imported tar holds an image that the table beside it does not know"
    IN_EARLIER_DATASET = "in_earlier_dataset", "a dataset of the key against has the pair, or has dropped it for good"
    SAMPLED_OUT = "sampled_out", "its source is taken in part only, and the pair is not in that part"
    NOT_DOWNLOADED = "not_downloaded", "left out before the download when the images were fetched, so there is none"
    MISSING_URL = "missing_url", "the row has no URL"
    INVALID_URL = "invalid_url", "the URL is malformed"
    UNSUPPORTED_SCHEME = "unsupported_scheme", "the URL, or a redirect, is neither http nor https"
    CAPTION_TOO_SHORT = "caption_too_short", "the caption is shorter than the smallest length kept"
    CAPTION_TOO_LONG = "caption_too_long", "the caption is longer than the greatest length kept"
    CAPTION_LANGUAGE = "caption_language", "the caption is not in one of the languages kept"

    CAPTION_NOT_TEXT = "caption_not_text", "too little of the caption is letters and digits"
    CAPTION_REPETITIVE = "caption_repetitive", "the caption repeats itself"
    CAPTION_PERSON_TAG = "caption_person_tag", "the caption has a tag in the place of a person's name"
    CAPTION_BLOCKED_WORD = "caption_blocked_word", "the caption has words that are not wanted"
    CAPTION_BOILERPLATE = "caption_boilerplate", "too many pairs have the same caption"
    URL_BLOCKED = "url_blocked", "the URL is on the list of those that are not wanted"
    URL_NOT_ALLOWED = "url_not_allowed", "the URL is not on the list of those that are wanted"
    HOST_BLOCKED = "host_blocked", "the host, or a domain above it, is on the list of those that are not wanted"
    HOST_NOT_ALLOWED = "host_not_allowed", "neither the host nor a domain above it is on the list of those wanted"

    # The download.
    FORBIDDEN_ADDRESS = (
        "forbidden_address",
        "the host, or a redirect's, has a loopback, private or special address",
    )
    ROBOTS_DISALLOWED = "robots_disallowed", "the site's robots.txt does not allow the request"
    ROBOTS_UNAVAILABLE = "robots_unavailable", "the site could not say what its robots.txt allows", True
    OPTED_OUT = "opted_out", "the site reserves the use of the image, in a header or in tdmrep.json"
    HOST_BUSY = "host_busy", "the host's turn did not come in time: too many requests to it were waiting", True
    UNKNOWN_HOST = "unknown_host", "the host's name does not exist"
    DNS_FAILURE = "dns_failure", "the host's name could not be resolved for the moment", True
    CONNECTION_FAILED = (
        "connection_failed",
        "the connection was refused, reset or closed without an answer",
        True,
    )
    TLS_FAILURE = "tls_failure", "the server's certificate or TLS handshake is not acceptable"
    TIMEOUT = "timeout", "the server was too slow", True
    HOST_UNAVAILABLE = (
        "host_unavailable",
        "the host failed again and again, or asked to wait for too long; it was left alone",
        True,
    )
    TOO_MANY_REDIRECTS = "too_many_redirects", "the server redirected more often than allowed"
    TOO_LARGE = "too_large", "the body is larger than allowed"
    TRUNCATED = "truncated", "the body ended before its announced length", True
    EMPTY_BODY = "empty_body", "the server answered without a body"
    BAD_RESPONSE = "bad_response", "the server's answer is not valid HTTP"

    # The image.
    NOT_AN_IMAGE = "not_an_image", "the body is not an image of a known format"
    TRUNCATED_IMAGE = "truncated_image", "the image ends early"
    UNDECODABLE_IMAGE = "undecodable_image", "the image is damaged or of an unknown variant"
    TOO_MANY_PIXELS = "too_many_pixels", "the image has more pixels than allowed"
    WORKER_KILLED = (
        "worker_killed",
        "the process that fetched it was killed again and again, as a rule for want of memory, with nothing else to do",
        True,
    )
    DECODER_CRASHED = "decoder_crashed", "decoding it crashed, took too long or too much memory"
    HASH_MISMATCH = "hash_mismatch", "the body does not have the hash that the list gives"
    BAD_BOXES = "bad_boxes", "the list's boxes to blur are not lists of four numbers"

    # Decisions.
    IMAGE_TOO_SMALL = "image_too_small", "the image's shorter side is below the smallest kept"
    IMAGE_TOO_ELONGATED = (
        "image_too_elongated",
        "the image's sides differ by more than the greatest ratio kept",
    )
    IMAGE_TOO_LARGE = "image_too_large", "the image has more pixels than the most kept"
    IMAGE_BLANK = "image_blank", "the image is of one colour"
    IMAGE_EMPTY = "image_empty", "the image has too little in it: few bytes for its pixels"
    IMAGE_BLURRED = "image_blurred", "the image is less sharp than the least kept"
    IMAGE_UNSAFE = "image_unsafe", "a model holds the image for not safe for work"
    CAPTION_MISMATCH = "caption_mismatch", "a model holds that the caption does not fit the image"
    NOT_SCORED = "not_scored", "a model that was asked about the image could not score it"
    EVALUATION_SET = "evaluation_set", "the image is that of an evaluation set, or very much like one"
    SEMANTIC_DUPLICATE = "semantic_duplicate", "another sample has an image that shows the same, as a model sees it"
    DUPLICATE_BYTES = "duplicate_bytes", "another kept sample has the very same bytes"
    DUPLICATE_URL = "duplicate_url", "another kept sample has the same URL"
    DUPLICATE_PAIR = "duplicate_pair", "another kept sample has the very same bytes and the same caption"
    NEAR_DUPLICATE = "near_duplicate", "another kept sample looks the same"
    BALANCED_OUT = (
        "balanced_out",
        "its concepts are frequent and it was not drawn, or its caption has none (the score is its chance to stay)",
    )


def http_reason(status: int) -> str:
    """The reason of a row whose server answered with an error status."""
    return f"http_{status}"


_TRANSIENT_HTTP = frozenset({408, 425, 429, *range(500, 600)} - {501, 505, 506, 508, 510, 511})
"""Of the 5xx without those that say that the server will never answer this request."""


def is_transient(reason: str) -> bool:
    """Whether the same request may succeed later; others are never repeated."""
    if reason.startswith("http_"):
        return int(reason.removeprefix("http_")) in _TRANSIENT_HTTP
    return not reason.startswith(USER_REASON) and Reason(reason).transient


def sentence(reason: str) -> str:
    """What a reason means, for people. Raises ValueError for a name that is none."""
    if reason.startswith("http_"):
        return f"the server answered with HTTP status {reason.removeprefix('http_')}"
    if reason.startswith(USER_REASON):
        return f"a rule of yours (curate.rules) does not keep it: {reason.removeprefix(USER_REASON).replace('_', ' ')}"
    return Reason(reason).sentence
