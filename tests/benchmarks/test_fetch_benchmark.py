"""The fetch benchmark runs and says what it promises; its figures are for `make bench-fetch` to judge."""

import re
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from meter import TreeMeter  # noqa: E402
from static_web import serve_folder  # noqa: E402


@pytest.mark.exhaustive
def test_a_small_run_prints_its_figures() -> None:
    command = [sys.executable, str(HERE / "fetch.py"), "--count=24", "--rounds=1", "--codec-photos=8"]
    command += ["--only=https.img2dataset", "--only=https.fast"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = dict(re.findall(r"^([\w.]+): ([\d.]+)", done.stdout, re.M))
    assert {
        "fetch.https.img2dataset.images_per_cpu_s",
        "fetch.https.fast.ratio_vs_img2dataset",
        "codec.exact.images_per_cpu_s",
        "codec.opencv.images_per_cpu_s",
        "fetch.peak_rss_mib",
        "fetch.fast.psnr_db",
    } <= set(figures)
    assert float(figures["fetch.https.fast.ratio_vs_img2dataset"]) > 0
    assert 60 < float(figures["fetch.peak_rss_mib"]) < 2_000
    assert 25 < float(figures["fetch.fast.psnr_db"]) < 80


@pytest.mark.parametrize("has_nginx", [True, False])
def test_the_server_serves_with_and_without_nginx(tmp_path: Path, has_nginx: bool) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.jpg").write_bytes(bytes(range(256)) * 1_000)
    with pytest.MonkeyPatch.context() as patch:
        if not has_nginx:
            patch.setattr("static_web.shutil.which", lambda name: None)
        with serve_folder(tmp_path / "root", tmp_path / "web") as web:
            context = ssl.create_default_context(cafile=str(web.ca_bundle))
            for scheme in ("http", "https"):
                for number in range(3):
                    url = web.url(scheme, number, f"a.jpg?{number}")
                    with urllib.request.urlopen(url, timeout=10, context=context) as response:
                        assert len(response.read()) == 256_000
    assert has_nginx or web.name == "python"


def test_a_tree_is_measured_with_its_children() -> None:
    burn = "import time; end = time.time() + 0.9\nwhile time.time() < end: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    process = subprocess.Popen([sys.executable, "-c", code])
    with TreeMeter(pid=process.pid, worker="-c") as meter:
        process.wait()
    assert meter.cpu_between(meter.times[0], meter.times[-1]) > 0.1
    assert meter.cpu_between(meter.times[0], meter.times[0]) == 0
    assert meter.peak_worker_bytes > 2**20
