"""Promises of ``glscl shards``: what each verb prints, how it ends, and what it leaves."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result
from xxhash import xxh3_64_hexdigest

from pipeline import cli
from sharding.errors import UserError
from sharding.manifest import load_manifest
from sharding.storage import Storage, open_storage
from tests.sharding.foreign_tars import write_img2dataset
from tests.sharding.real_media import picture, write_image_dataset

KEY = "000001-000002"


@pytest.fixture
def dataset(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "store" / "datasets" / "pictures-0123")
    write_image_dataset(storage, 4, shards=2)
    return storage


def glscl(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["shards", *arguments], catch_exceptions=False)


def value_of(*arguments: str) -> dict:
    """What a verb prints with --json."""
    result = glscl(*arguments, "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        glscl(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_verb_has_help_with_an_example():
    listing = glscl("--help").stdout
    for verb in ("ls", "inspect", "verify", "stats", "retract", "merge", "index"):
        assert f" {verb} " in listing
        assert f"Example: glscl shards {verb}" in " ".join(glscl(verb, "--help").stdout.split())


def test_ls_lists_the_datasets_under_a_storage(dataset, tmp_path):
    write_image_dataset(open_storage(tmp_path / "store" / "datasets" / "more-4567"), 3, name="more")
    (tmp_path / "store" / "datasets" / "odd").mkdir()
    (tmp_path / "store" / "datasets" / "odd" / "manifest.json").write_text("{}")
    glscl("retract", dataset.url, "--key", KEY, "--reason", "x")
    rows = value_of("ls", str(tmp_path / "store"))
    assert [(row.get("name"), row.get("samples"), row.get("dropped")) for row in rows] == [
        ("more", 3, 0), (None, None, None), ("pictures", 8, 1),
    ]  # fmt: skip
    text = glscl("ls", str(tmp_path / "store")).stdout
    assert rows[2]["digest"][:12] in text
    assert "folder file:///raw" in text
    assert "cannot be read" in text
    assert value_of("ls", str(tmp_path / "store" / "datasets" / "more-4567"))[0]["name"] == "more"
    (tmp_path / "empty").mkdir()
    assert "no dataset under" in glscl("ls", str(tmp_path / "empty")).stdout
    assert "does not exist" in refusal("ls", str(tmp_path / "nowhere"))


def test_inspect_shows_a_dataset_a_sample_and_writes_its_media(dataset, tmp_path):
    text = glscl("inspect", dataset.url).stdout
    assert "pictures" in text
    assert load_manifest(dataset).digest in text
    sample = value_of("inspect", dataset.url, "--key", KEY, "--out", str(tmp_path / "a.jpg"))
    assert (tmp_path / "a.jpg").read_bytes() == picture(6)
    assert (sample["shard"], sample["row"], sample["captions"]) == (1, 2, ["picture 6", "ein Bild"])
    assert sample["index"]["source"] == "source/6.jpg"
    assert value_of("inspect", dataset.url, "--shard", "1", "--row", "2") == sample
    assert "ein Bild" in glscl("inspect", dataset.url, "--shard", "0").stdout
    checksum = xxh3_64_hexdigest(picture(6))
    assert re.search(rf"xxh3 +{checksum}\b", glscl("inspect", dataset.url, "--key", KEY).stdout)
    assert "has no sample with the key nobody" in refusal("inspect", dataset.url, "--key", "nobody")
    assert "shards 0 to 1" in refusal("inspect", dataset.url, "--shard", "2")
    assert "samples 0 to 3" in refusal("inspect", dataset.url, "--shard", "1", "--row", "4")
    assert "--out needs a sample" in refusal("inspect", dataset.url, "--out", "x")


def test_inspect_does_not_hand_out_what_was_retracted(dataset, tmp_path):
    glscl("retract", dataset.url, "--key", KEY, "--reason", "x")
    assert "dropped by the manifest" in value_of("inspect", dataset.url, "--key", KEY)["problem"]
    message = refusal("inspect", dataset.url, "--key", KEY, "--out", str(tmp_path / "a.jpg"))
    assert "retracted" in message
    assert not (tmp_path / "a.jpg").exists()


def test_verify_ends_with_0_where_all_is_well_and_with_1_and_the_faults_where_not(dataset):
    result = glscl("verify", dataset.url, "--jobs", "1")
    assert result.exit_code == 0
    assert "sound; 8 samples in 2 shards" in result.stdout
    data = bytearray(dataset.read_bytes("000001.tar"))
    data[600] ^= 1
    dataset.write_bytes("000001.tar", bytes(data))
    result = glscl("verify", dataset.url, "--jobs", "1")
    assert result.exit_code == 1
    assert "000001.tar, key 000001-000000, byte 512: checksum-mismatch" in result.stdout
    assert "1 fault; " in result.stdout
    value = json.loads(glscl("verify", dataset.url, "--jobs", "1", "--decode", "--json").stdout)
    assert (value["sound"], value["faults"][0]["key"], value["faults"][0]["offset"]) == (
        False,
        "000001-000000",
        512,
    )


def test_stats_counts_what_is_not_dropped(dataset):
    glscl("retract", dataset.url, "--key", KEY, "--reason", "x")
    value = value_of("stats", dataset.url)
    assert (value["samples"], value["shards"], value["extensions"]) == (7, 2, {"jpg": 7})
    width = value["distributions"]["width"]
    assert (width["smallest"], width["largest"], width["count"]) == (24, 24, 7)
    assert sum(count for _, _, count in value["distributions"]["caption_length"]["bins"]) == 7
    text = glscl("stats", dataset.url).stdout
    assert "7 samples, 14 captions, 2 shards" in text
    assert "█" in text


def test_stats_leaves_out_many_dropped_rows_too(dataset, monkeypatch):
    monkeypatch.setattr("sharding.overlay.INLINE_KEYS", 0)
    glscl("retract", dataset.url, "--where", "key startswith '000001'", "--reason", "x")
    assert value_of("stats", dataset.url)["samples"] == 4


def test_retract_drops_by_key_file_and_rule_and_undoes(dataset, tmp_path):
    digest = load_manifest(dataset).digest
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{KEY}\n\n000000-000000 \n")
    dry = value_of("retract", dataset.url, "--keys-file", str(keys), "--dry-run")
    assert (dry["change"], dry["keys"], dry["digest"]) == (2, ["000000-000000", KEY], None)
    assert load_manifest(dataset).digest == digest
    value = value_of("retract", dataset.url, "--keys-file", str(keys), "--reason", "asked to")
    assert (value["change"], value["dropped"], value["digest_before"]) == (2, 2, digest)
    assert load_manifest(dataset).digest == value["digest"] != digest
    text = glscl("retract", dataset.url, "--where", "source = 'source/1.jpg'", "--reason", "by rule").stdout
    assert "1 of 8 samples are dropped" in text
    assert "until it is started again" in text
    shown = glscl("inspect", dataset.url).stdout
    assert "5 (3 of 8 retracted)" in shown
    assert "asked to" in shown
    assert "source = 'source/1.jpg'" in shown
    assert "1 samples would be there again" in glscl("retract", dataset.url, "--undo", "--dry-run").stdout
    assert value_of("retract", dataset.url, "--undo", "--reason", "wrong")["change"] == -1
    assert load_manifest(dataset).digest == value["digest"]


def test_retract_refuses_what_is_unclear(dataset):
    for arguments in ([], ["--key", "a", "--where", "width < 3"], ["--undo", "--key", "a"]):
        assert "say what to retract" in refusal("retract", dataset.url, *arguments, "--reason", "x")
    assert "--reason" in refusal("retract", dataset.url, "--key", KEY)
    assert "no sample with the key nobody" in refusal(
        "retract", dataset.url, "--key", "nobody", "--reason", "x"
    )
    assert "expected a column" in refusal("retract", dataset.url, "--where", "with < 3", "--reason", "x")
    assert "cannot be read" in refusal("retract", dataset.url, "--keys-file", "/no/file", "--reason", "x")
    assert load_manifest(dataset).dropped == 0


def test_merge_makes_a_dataset_in_the_storage(dataset, tmp_path):
    other = open_storage(tmp_path / "store" / "datasets" / "more-4567")
    write_image_dataset(other, 3, name="more", first_seed=7)
    into = str(tmp_path / "out")
    arguments = ("merge", dataset.url, other.url, "--into", into, "--name", "all", "--drop-duplicates")
    value = value_of(*arguments)
    assert (value["samples"], value["duplicates"], value["dropped"], value["shards"]) == (11, 1, 1, 3)
    assert value["made_from"] == "merge of pictures, more"
    text = glscl(*arguments).stdout
    assert "prefixed m1-" in text
    assert value["url"] in text
    assert glscl("verify", value["url"], "--jobs", "1").exit_code == 0
    assert "use letters" in refusal("merge", dataset.url, other.url, "--into", into, "--name", "../x")


def test_index_makes_img2datasets_folder_a_dataset(tmp_path):
    write_img2dataset(tmp_path / "laion")
    folder = str(tmp_path / "laion")
    value = value_of("index", folder, "--modality", "image")
    assert (value["name"], value["samples"], value["shards"]) == ("laion", 8, 2)
    assert "read / kept" in glscl("index", folder).stdout
    assert glscl("verify", folder, "--jobs", "1").exit_code == 0
    assert "must be image or video" in refusal("index", folder, "--modality", "sound")
    assert value_of("inspect", folder, "--key", "000010002")["captions"] == ["picture 10002"]


def test_a_place_that_is_no_dataset_is_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for verb in ("inspect", "verify", "stats"):
        assert "no dataset at" in refusal(verb, str(tmp_path / "empty"))
    assert "no dataset at" in refusal("retract", str(tmp_path / "empty"), "--key", "a", "--reason", "x")
    assert "has no .tar" in refusal("index", str(tmp_path / "empty"))
    assert "--endpoint-url" in refusal("inspect", "s3://bucket/x", "--endpoint-url", "nonsense")


@pytest.mark.server
def test_all_verbs_work_on_s3_with_an_endpoint_option(s3_server, tmp_path, monkeypatch):
    for name, setting in s3_server.environment.items():
        if name != "AWS_ENDPOINT_URL":
            monkeypatch.setenv(name, setting)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    root = s3_server.fresh("store")
    options = ("--endpoint-url", s3_server.endpoint_url)
    storage = open_storage(s3_server.config(root))
    write_image_dataset(storage.at("datasets/a-1"), 3, name="a")
    write_image_dataset(storage.at("datasets/b-2"), 2, name="b", first_seed=50)
    a, b = f"{root}/datasets/a-1", f"{root}/datasets/b-2"
    assert [row["name"] for row in value_of("ls", root, *options)] == ["a", "b"]
    assert value_of("retract", a, "--key", "000000-000001", "--reason", "x", *options)["dropped"] == 1
    merged = value_of("merge", a, b, "--into", root, "--name", "ab", *options)
    assert (merged["samples"], merged["dropped"]) == (5, 1)
    assert value_of("verify", merged["url"], "--jobs", "2", *options)["sound"]
    assert value_of("stats", merged["url"], *options)["samples"] == 4
    out = tmp_path / "x.jpg"
    glscl("inspect", merged["url"], "--key", "m1-000000-000001", "--out", str(out), *options)
    assert out.read_bytes() == picture(51)
    (tmp_path / "foreign").mkdir()
    write_img2dataset(tmp_path / "foreign", shards=1)
    for path in sorted((tmp_path / "foreign").iterdir()):
        storage.upload(path, f"foreign/{path.name}")
    assert value_of("index", f"{root}/foreign", *options)["samples"] == 4


def test_interrupted_and_bad_data_end_the_command_with_their_codes(dataset, monkeypatch, capsys):
    dataset.delete("000001.parquet")
    monkeypatch.setattr("sys.argv", ["glscl", "shards", "stats", dataset.url])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "error: missing-index: " in capsys.readouterr().err
