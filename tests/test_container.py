"""Dockerfile, compose.yaml and .dockerignore fit the repository and each other; nothing is built here."""

import fnmatch
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from nanochat.serve.middleware import PUBLIC_PATHS

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [line for line in DOCKERFILE.replace("\\\n", " ").splitlines() if re.match("[A-Z]+ ", line)]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
IGNORE = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]


def of_kind(kind: str) -> list[str]:
    return [line.removeprefix(f"{kind} ").strip() for line in INSTRUCTIONS if line.startswith(f"{kind} ")]


def test_what_is_copied_exists_and_only_what_is_named_gets_into_the_image():
    assert IGNORE[0] == "*"
    let_in = {line[1:] for line in IGNORE if line[0] == "!"}
    assert all((ROOT / name).exists() for name in let_in)
    for arguments in of_kind("COPY"):
        *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
        if "--from" not in arguments:
            assert all(source == "." or source.split("/")[0] in let_in for source in sources)
    imported = {
        match
        for path in (ROOT / "scripts").glob("*.py")
        for match in re.findall(r"^from (\w+)", path.read_text(), re.M)
    }
    assert imported & {path.name for path in ROOT.iterdir()} <= let_in
    for secret in (".env", ".git", "report.md", "id_rsa", "compose.yaml"):
        assert not any(fnmatch.fnmatch(secret, name) for name in let_in)


def test_the_container_runs_the_server_for_others_without_rights_and_asks_it_how_it_is(monkeypatch):
    kind, module, *flags = of_kind("CMD")[-1].strip("[]").replace('"', "").split(", ")[1:]
    assert (kind, module) == ("-m", "scripts.chat_web")
    monkeypatch.setattr("sys.argv", ["chat_web", *flags])
    args = importlib.import_module("scripts.chat_web").parse_args()
    assert args.host == "0.0.0.0"
    assert of_kind("EXPOSE") == [str(args.port)]
    (health,) = of_kind("HEALTHCHECK")
    assert re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", health).groups() == (str(args.port), "/health")
    assert "/health" in PUBLIC_PATHS
    assert of_kind("USER") == ["1000:1000"]
    for service in COMPOSE["services"].values():
        assert service["ports"] == [f"${{NANOCHAT_ADDRESS:-127.0.0.1}}:{args.port}:{args.port}"]
        assert int(service["stop_grace_period"].removesuffix("s")) > args.drain_seconds


def test_the_image_is_made_by_the_set_up_of_the_lock_and_each_argument_is_known():
    assert any("bash runs/setup.sh" in line for line in of_kind("RUN"))
    assert "requirements.lock" in " ".join(of_kind("COPY"))
    arguments = {line.partition("=")[0] for line in of_kind("ARG")}
    assert set(COMPOSE["services"]["chat-cpu"]["build"]["args"]) == arguments
    set_up = (ROOT / "runs" / "setup.sh").read_text()
    assert all(f"${{{name}:-" in set_up for name in arguments - {"BASE"})


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_has_a_key_and_the_work_folder_and_only_one_of_them_wants_gpus(name):
    service = COMPOSE["services"][name]
    assert service["environment"]["NANOCHAT_API_KEY"].startswith("${NANOCHAT_API_KEY:?")
    (volume,) = service["volumes"]
    assert volume == f"${{NANOCHAT_BASE_DIR:-~/.cache/nanochat}}:{of_kind('VOLUME')[0]}"
    assert f"NANOCHAT_BASE_DIR={of_kind('VOLUME')[0]}" in shlex.split(of_kind("ENV")[-1])
    assert ("deploy" in service) == (name == "chat")
    assert ("profiles" in service) == (name != "chat")
    header = (ROOT / "compose.yaml").read_text().split("x-chat:")[0]
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    assert used == set(re.findall(r"^#   (NANOCHAT_\w+)  ", header, re.M))
