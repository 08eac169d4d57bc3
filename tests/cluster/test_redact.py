"""What signs a URL never leaves the process."""

import logging

import pytest

from cluster.redact import REDACTED, redact, redact_text, redact_url

SIGNED = {
    "AWS": "https://b.s3.amazonaws.com/a/list.csv?X-Amz-Algorithm=A&X-Amz-Credential=AK%2F1&X-Amz-Date=2&X-Amz-Expires=9"
    "&X-Amz-SignedHeaders=host&X-Amz-Signature=SECRET",
    "AWS, old": "https://b.s3.amazonaws.com/a/list.csv?AWSAccessKeyId=AK&Expires=9&Signature=SECRET",
    "Google": "https://storage.googleapis.com/b/list.csv?X-Goog-Credential=AK&X-Goog-Date=1&X-Goog-Signature=SECRET",
    "Azure": "https://a.blob.core.windows.net/b/list.csv?sv=1&st=1&se=2&sr=b&sp=r&sig=SECRET",
    "token": "https://a.test/list.csv?token=SECRET#part",
}


@pytest.mark.parametrize("kind", SIGNED)
def test_a_signature_is_removed_and_the_rest_stays(kind: str) -> None:
    shown = redact_url(SIGNED[kind])
    assert "SECRET" not in shown
    assert "AK" not in shown
    assert shown.startswith(SIGNED[kind].partition("?")[0] + "?" + REDACTED)
    assert redact_url(shown) == shown


def test_the_same_object_signed_again_is_the_same() -> None:
    again = SIGNED["AWS"].replace("Date=2", "Date=3").replace("SECRET", "OTHER")
    assert redact_url(again) == redact_url(SIGNED["AWS"])
    assert redact_url(again + "&versionId=7") != redact_url(again)


def test_what_is_not_signed_stays_as_it_is() -> None:
    for url in ("https://a.test/x?se=1&expires=2", "s3://bucket/key", "list?sig=1", "https://a.test/x?q=a+b&w=1"):
        assert redact(url) == url
    assert redact({"a": [1, None, {"b": "no url"}]}) == {"a": [1, None, {"b": "no url"}]}


def test_texts_and_nested_values_are_searched() -> None:
    text = f"cannot read {SIGNED['AWS']}: 403; also ftp://user:word@host/x, thrice"
    assert "SECRET" not in redact_text(text)
    assert "word@" not in redact_text(text)
    assert redact_text(text).endswith("@host/x, thrice")
    assert "SECRET" not in str(redact({"input": list(SIGNED.values())}))


def test_log_lines_are_searched(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    from cluster.redact import redact_logs

    root = logging.getLogger()
    before = [(handler, handler.formatter) for handler in root.handlers]
    try:
        redact_logs()
        logging.getLogger("a").warning("trying %s again", SIGNED["Azure"])
        assert "SECRET" not in caplog.text
        assert "https://a.blob.core.windows.net/b/list.csv" in caplog.text
    finally:
        for handler, formatter in before:
            handler.setFormatter(formatter)
