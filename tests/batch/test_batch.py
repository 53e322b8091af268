from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from auto_voice.batch.executors import InlineExecutor, ProcessExecutor, WorkerSpec, _Fetching
from auto_voice.batch.jobs import BatchJob, Defaults, collect
from auto_voice.batch.manifest import (
    VOICES_KEPT,
    Converting,
    Manifest,
    _make_folder,
    run_batch,
)
from auto_voice.cli.batch import duration
from auto_voice.cli.main import main
from auto_voice.errors import (
    AudioNotFoundError,
    AudioOutputError,
    AutoVoiceError,
    CatalogError,
    ConfigError,
)
from auto_voice.filesystem import shown_url, without_secrets
from auto_voice.inference.result import OutputSpec
from hand_made_stages import speech_like

VOICE = ("v.wav",)


def made(**fields):
    return Defaults(voice=VOICE, **fields)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.wav", "in/sub/b.flac", "in/notes.txt", "in/.hidden.wav", "v.wav"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path


def test_folders_keep_their_shape_and_patterns_are_files():
    jobs = collect(["in"], made(output=OutputSpec("out", "flac")))
    assert [(j.source, j.target) for j in jobs] == [
        ("in/a.wav", "out/a.flac"),
        ("in/sub/b.flac", "out/sub/b.flac"),
    ]
    assert [j.source for j in collect(["in/**/*.flac", "v.wav"], made())] == [
        "in/sub/b.flac",
        "v.wav",
    ]


def test_no_file_of_a_folder_is_passed_over_in_silence(caplog):
    for name in ("memo.m4a", "clip.MOV", "old.aifc"):
        Path("in", name).touch()
    jobs = collect(["in"], made())
    assert {Path(j.source).name for j in jobs} == {"a.wav", "b.flac", "memo.m4a", "clip.MOV",
                                                   "old.aifc"}  # fmt: skip
    (line,) = caplog.messages
    assert line.startswith("in: ignored")
    assert line.endswith("notes.txt")
    Path("in/elsewhere").symlink_to("sub")
    Path("in/dead.wav").symlink_to("nowhere.wav")
    assert "in/dead.wav" in {j.source for j in collect(["in"], made())}
    assert caplog.messages[-1].startswith("in: not looked into")
    assert caplog.messages[-1].endswith("elsewhere")


def test_results_in_the_folder_are_not_sources():
    Path("in/out").mkdir()
    Path("in/out/a.wav").touch()
    assert len(collect(["in"], made(output=OutputSpec("in/out")))) == 2


@pytest.mark.parametrize("output", [".", "in"])
def test_results_may_lie_around_their_sources(output):
    jobs = collect(["in/sub"], made(output=OutputSpec(output)))
    assert [(j.source, j.target) for j in jobs] == [
        ("in/sub/b.flac", str(Path(output, "b.wav"))),
    ]
    assert len(collect(["in/sub"], made(output=OutputSpec("in/sub")))) == 1


def test_tables_have_their_own_voices_and_options():
    Path("in/jobs.csv").write_text(
        "source,voice,output,semitones,trim\na.wav,,x.mp3,-2,yes\nsub/b.flac,../v.wav|a.wav,,,\n"
    )
    Path("jobs.jsonl").write_text('{"source": "in/a.wav", "strength": 0.5, "rate": 48000}\n\n')
    first, second = collect(["in/jobs.csv"], made(controls={"energy": 0.5}))
    assert (first.source, first.target) == ("in/a.wav", "converted/x.mp3")
    assert first.controls == {"semitones": -2.0, "trim": True, "energy": 0.5}
    assert second.voice == ("in/../v.wav", "in/a.wav")
    (third,) = collect(["jobs.jsonl"], made())
    assert (third.controls, third.output.rate, third.voice) == ({"strength": 0.5}, 48000, VOICE)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("x.csv", "file\na.wav\n", "must name the columns, source among them"),
        ("x.csv", "source,semitones\na.wav,much\n", "x.csv:2: semitones must be a number"),
        ("x.csv", "source\na.wav,b\n", "x.csv:2: more cells than columns"),
        ("x.csv", "source,output\na.wav,../../b.wav\n", "climbs out of the output folder"),
        ("x.jsonl", '{"source": "a"}\nno\n', "x.jsonl:2: this line is not JSON"),
        ("x.jsonl", '{"voice": "a"}\n', "x.jsonl:1: there is no source"),
        ("x.jsonl", "[1]\n", "a job is an object"),
        ("x.jsonl", '{"source": "a", "volume": 1}\n', "there is no control volume"),
        ("x.jsonl", '{"source": "a", "rate": "hi"}\n', "rate must be a whole number"),
    ],
)
def test_bad_tables_name_file_and_line(name, text, match):
    Path(name).write_text(text)
    with pytest.raises(ConfigError, match=match):
        collect([name], made())


def test_what_cannot_be_collected_is_said():
    with pytest.raises(AudioNotFoundError, match="no file or folder nothing"):
        collect(["nothing"], made())
    Path("empty").mkdir()
    with pytest.raises(AudioNotFoundError, match="holds no recordings"):
        collect(["empty"], made())
    with pytest.raises(ConfigError, match=r"in/a.wav has no voice"):
        collect(["in/a.wav"], Defaults())
    Path("a.wav").touch()
    with pytest.raises(ConfigError, match=r"in/a.wav and a.wav would both become"):
        collect(["in/a.wav", "a.wav"], made())


# Workers that need no models. They are named, so that processes can import them.


def writing(**_):
    def work(record):
        if "bad" in record["source"]:
            return {"status": "failed", "error": "it is bad"}
        Path(record["output"]).write_text(record["source"])
        return {"status": "done", "seconds": 2.0, "notes": ["a note"], "pid": os.getpid()}

    return work


def dying(**_):
    def work(record):
        if "bad" in record["source"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return writing()(record)

    return work


def batch_jobs(*names):
    return [BatchJob(name, OutputSpec(f"{name}.out"), VOICE) for name in names]


SPEC = WorkerSpec(f"{__name__}:writing")


def run(jobs, executor=None, spec=SPEC, **options):
    with Manifest(Path("out/manifest.jsonl")) as manifest:
        outcomes = run_batch(jobs, executor or InlineExecutor(), spec, manifest, **options)
        return {o.job.source: o.status for o in outcomes}


def test_failures_do_not_stop_the_others_and_done_is_not_done_again():
    jobs = batch_jobs("in/a.wav", "bad", "in/sub/b.flac")
    first = run(jobs)
    assert first == {"in/a.wav": "done", "bad": "failed", "in/sub/b.flac": "done"}
    assert run(jobs) == {"in/a.wav": "skipped", "bad": "failed", "in/sub/b.flac": "skipped"}
    assert run(jobs, overwrite=True)["in/a.wav"] == "done"
    Path("in/a.wav").write_text("another recording")
    Path("in/sub/b.flac.out").unlink()
    assert run(jobs)["in/a.wav"] == "done"
    assert Path("in/sub/b.flac.out").exists()


@pytest.fixture
def memory(monkeypatch):
    """The file system of fsspec that lives in this process."""
    fsspec = pytest.importorskip("fsspec", reason="needs the extra ray")
    files = fsspec.filesystem("memory")
    monkeypatch.setattr(type(files), "store", {})
    monkeypatch.setattr(type(files), "pseudo_dirs", [""])
    return files


def test_addresses_are_listed_like_folders(memory, caplog):
    for name in ("in/a.wav", "in/sub/b.flac", "in/notes.txt", "in/out/a.wav"):
        memory.pipe(f"/{name}", b"")
    jobs = collect(["memory://in"], made(output=OutputSpec("memory://in/out")))
    assert [(j.source, j.target) for j in jobs] == [
        ("memory:///in/a.wav", "memory://in/out/a.wav"),
        ("memory:///in/sub/b.flac", "memory://in/out/sub/b.wav"),
    ]
    assert caplog.messages == [
        "memory://in: ignored, because their names are not of recordings: notes.txt"
    ]
    for given in ("memory://in/a.wav", "memory://in/a.*"):
        assert [j.target for j in collect([given], made())] == ["converted/a.wav"]
    Path("jobs.csv").write_text(
        "source,voice,output\nmemory://in/a.wav,memory://v.wav,\nin/a.wav,,memory://o/x.wav\n"
    )
    first, second = collect(["jobs.csv"], made(output=OutputSpec("out")))
    assert (first.source, first.voice, first.target) == (
        "memory://in/a.wav", ("memory://v.wav",), "out/a.wav",
    )  # fmt: skip
    assert (second.source, second.target) == ("in/a.wav", "memory://o/x.wav")


def test_what_has_an_address_is_fetched_and_brought_and_not_done_twice(memory):
    memory.pipe({"/in/a.wav": b"one", "/in/bad.wav": b"two", "/v.wav": b"voice"})
    jobs = [
        BatchJob(f"memory://in/{name}", OutputSpec(f"memory://out/{name}"), ("memory://v.wav",))
        for name in ("a.wav", "bad.wav", "none.wav")
    ]
    spec = WorkerSpec(
        f"{__name__}:reading", reads=("source",), shared=("voice",), writes=("output",)
    )
    first = run(jobs, spec=spec)
    assert list(first.values()) == ["done", "failed", "failed"]
    assert memory.cat("/out/a.wav") == b"one by voice"
    assert memory.find("/out") == ["/out/a.wav"]
    lines = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    errors = {line["source"]: line["error"] for line in lines if "error" in line}
    assert errors == {
        "memory://in/bad.wav": "memory://in/bad.wav is bad",
        "memory://in/none.wav": "memory://in/none.wav cannot be read (there is no such file).",
    }
    assert run(jobs[:1], spec=spec) == {"memory://in/a.wav": "skipped"}
    memory.pipe("/in/a.wav", b"other")
    assert run(jobs[:1], spec=spec) == {"memory://in/a.wav": "done"}
    assert memory.cat("/out/a.wav") == b"other by voice"
    memory.pipe("/out/bad.wav", b"of another batch")
    Path("out/manifest.jsonl").unlink()
    assert run(jobs[1:2], spec=spec) == {"memory://in/bad.wav": "failed"}
    assert memory.cat("/out/bad.wav") == b"of another batch"


def reading(**_):
    def work(record):
        if "bad" in record["source"]:
            return {"status": "failed", "error": f"{record['source']} is bad"}
        source, voice = (Path(p).read_text() for p in (record["source"], *record["voice"]))
        Path(record["output"]).write_text(f"{source} by {voice}")
        return {"status": "done"}

    return work


def test_addresses_that_lead_nowhere_are_told(memory):
    with pytest.raises(AudioNotFoundError, match="there are no recordings at memory://none"):
        collect(["memory://none"], made())
    with pytest.raises(ConfigError, match=r"nosuch://x cannot be reached \(Protocol not known"):
        collect(["nosuch://x"], made())
    (job,) = batch_jobs("nosuch://x")
    assert _Fetching(replace(SPEC, reads=("source",)), writing())(job.record()) == {
        "status": "failed",
        "error": "nosuch://x cannot be reached (Protocol not known: nosuch).",
    }


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("in/a@b.wav", "in/a@b.wav"),
        ("s3://bucket/a@b.wav", "s3://bucket/a@b.wav"),
        ("s3://bucket/talk?.wav", "s3://bucket/talk?.wav"),
        ("sftp://host:22/a@b.wav", "sftp://host:22/a@b.wav"),
        ("sftp://[::1]:22/a@b.wav", "sftp://[::1]:22/a@b.wav"),
        ("sftp://me:secret@host/a@b.wav", "sftp://***@host/a@b.wav"),
        ("sftp://me:sec@ret@host:22/x", "sftp://***@host:22/x"),
        ("s3://KEY:sec/ret@bucket/x", "s3://***@bucket/x"),
        ("s3://KEY:sec#r?e[t@bucket/x", "s3://***@bucket/x"),
        ("https://host/x.wav?sig=secret&a=1", "https://host/x.wav?***"),
        ("https://host/x.wav?secret", "https://host/x.wav?***"),
        ("abfs://box/x.wav?sig=secret", "abfs://box/x.wav?***"),
        ("simplecache::s3://KEY:sec/ret@bucket/x", "simplecache::s3://***@bucket/x"),
    ],
)
def test_addresses_are_shown_without_password_and_signature(url, shown):
    assert shown_url(url) == shown
    assert without_secrets(f"404 at '{url}', sorry") == f"404 at '{shown}', sorry"


def test_no_password_is_printed_or_kept_and_a_batch_still_goes_on(memory, monkeypatch, capsys):
    """The file system in memory has no users, so it is told of the address without them."""
    import fsspec

    opened = fsspec.core.url_to_fs
    monkeypatch.setattr(
        fsspec.core, "url_to_fs",
        lambda url, **options: opened(url.replace("me:secret@", "").split("?")[0], **options),
    )  # fmt: skip
    memory.pipe({"/in/a.wav": b"one", "/in/bad.wav": b"two", "/v.wav": b"voice"})
    place = "memory://me:secret@"
    jobs = [
        BatchJob(
            f"{place}in/{name}?sig=secret", OutputSpec(f"{place}out/{name}"), (f"{place}v.wav",)
        )
        for name in ("a.wav", "bad.wav", "none.wav")
    ]
    spec = WorkerSpec(
        f"{__name__}:reading", reads=("source",), shared=("voice",), writes=("output",)
    )
    assert list(run(jobs, spec=spec).values()) == ["done", "failed", "failed"]
    assert memory.cat("/out/a.wav") == b"one by voice"
    # Found again by what is not shown, and what lies there is this batch's own to replace.
    assert list(run(jobs[:1], spec=spec).values()) == ["skipped"]
    memory.pipe("/in/a.wav", b"other")
    assert list(run(jobs[:1], spec=spec).values()) == ["done"]
    memory.pipe("/out/foreign.wav", b"of another batch")
    other = replace(jobs[0], output=OutputSpec(f"{place}out/foreign.wav"))
    assert list(run([other], spec=spec).values()) == ["failed"]
    kept = Path("out/manifest.jsonl").read_text()
    assert "secret" not in kept
    assert '"source": "memory://***@in/none.wav?***"' in kept
    row = {"source": jobs[2].source, "voice": [*jobs[2].voice], "output": jobs[2].target}
    Path("jobs.jsonl").write_text(json.dumps(row))
    Path("signed.csv").write_text("source,voice\nhttps://host/b.wav?sig=sec/ret.x,v.wav\n")
    assert [job.target for job in collect(["signed.csv"], made())] == ["converted/b.wav"]
    for more in (["--json"], [], ["--dry-run"], ["--dry-run", "--json"]):
        asked = ["batch", "jobs.jsonl", "--mock", "--workers", "1", *more]
        assert main(asked) == (0 if "--dry-run" in more else 2)
        told = capsys.readouterr()
        assert "none.wav" in told.out + told.err
        assert "secret" not in told.out + told.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--resources", "gpu=1"], "--resources are of a Ray cluster; add --executor ray"),
        (["--address", "ray://head:1"], "--address is of a Ray cluster; add --executor ray"),
        (["--executor", "ray", "--resources", "gpu"], "'gpu' is no resource; write NAME=AMOUNT"),
        (["-o", "memory://out"], "memory://out cannot hold the manifest; name a file here with"),
    ],
)
def test_options_that_do_not_fit_are_told_before_any_work(options, sentence, capsys):
    assert main(["batch", "in/a.wav", "--voice", "v.wav", "--mock", *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("converted").exists()


def test_the_variable_of_an_address_asks_for_no_cluster(monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:1")
    soundfile.write("talk.wav", speech_like(1.0), 16000)
    soundfile.write("voice.wav", speech_like(3.0, 200.0), 16000)
    asked = ["batch", "talk.wav", "--voice", "voice.wav", "--mock", "--workers", "1"]
    assert main(asked) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_foreign_files_are_not_replaced():
    (job,) = batch_jobs("in/a.wav")
    Path(job.target).write_text("mine")
    assert run([job]) == {"in/a.wav": "failed"}
    assert run([job]) == {"in/a.wav": "failed"}
    assert Path(job.target).read_text() == "mine"
    assert run([job], overwrite=True) == {"in/a.wav": "done"}


def test_a_line_that_was_cut_is_dropped_and_a_foreign_file_refused():
    jobs = batch_jobs("in/a.wav", "in/sub/b.flac")
    run(jobs)
    path = Path("out/manifest.jsonl")
    data = path.read_bytes()
    for cut in (1, 20, len(data.splitlines()[-1]) + 1):
        path.write_bytes(data[:-cut])
        assert run(jobs)["in/a.wav"] == "skipped"
        assert all(json.loads(line) for line in path.read_text().splitlines())
    path.write_text("something else\n")
    with pytest.raises(AudioOutputError, match="no line of a batch manifest"):
        run(jobs)


def test_two_batches_do_not_share_a_manifest():
    with (
        Manifest(Path("out/manifest.jsonl")),
        pytest.raises(AudioOutputError, match="another batch is writing"),
        Manifest(Path("out/manifest.jsonl")),
    ):
        pass


def test_processes_do_all_jobs_and_survive_a_dying_worker(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    jobs = batch_jobs(*(f"j{i}" for i in range(6)), "bad", "z")
    outcomes = run(jobs, ProcessExecutor(2), WorkerSpec("test_batch:dying"))
    assert outcomes.pop("bad") == "lost"
    assert set(outcomes.values()) == {"done"}
    lines = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    (lost,) = [line for line in lines if line.get("status") == "lost"]
    assert "SIGKILL" in lost["error"]


def unmakeable(**_):
    raise CatalogError("models.yaml:3: there is no key modles; write models.")


@pytest.mark.parametrize(
    ("factory", "kind", "sentence"),
    [
        ("unmakeable", CatalogError, r"^models\.yaml:3: there is no key modles; write models\.$"),
        ("missing", AutoVoiceError, "no worker can be started .*missing"),
    ],
)
def test_a_worker_that_cannot_be_made_ends_the_run(monkeypatch, capfd, factory, kind, sentence):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(kind, match=sentence):
        run(batch_jobs("a", "b", "c"), ProcessExecutor(2), WorkerSpec(f"test_batch:{factory}"))
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_converts_with_one_pipeline_and_makes_each_voice_once(mock_pipeline, monkeypatch):
    for name in ("a.wav", "b.wav", "v.wav"):
        soundfile.write(name, speech_like(3.0, 120.0 if name != "v.wav" else 200.0), 16000)
    clones = []
    own = type(mock_pipeline).voice
    monkeypatch.setattr(
        type(mock_pipeline), "voice", lambda self, *a: clones.append(a[0]) or own(self, *a)
    )
    work = Converting(mock_pipeline)
    record = {"voice": ["v.wav"], "controls": {"semitones": 2.0}, "format": None,
              "subtype": "24", "rate": 44100, "allow_mock": True}  # fmt: skip
    for name in ("a", "b"):
        result = work(record | {"source": f"{name}.wav", "output": f"new/{name}.wav"})
        assert (result["status"], result["seconds"]) == ("done", 3.0)
        info = soundfile.info(f"new/{name}.wav")
        assert (info.samplerate, info.subtype) == (44100, "PCM_24")
    assert sum(not hasattr(target, "embedding") for target in clones) == 1
    missing = work(record | {"source": "none.wav", "output": "new/c.wav"})
    assert missing["status"] == "failed"
    assert "none.wav" in missing["error"]


@pytest.mark.slow
def test_a_worker_keeps_a_few_voices_and_not_those_of_a_whole_table(mock_pipeline):
    work = Converting(mock_pipeline)
    for number in range(VOICES_KEPT + 2):
        name = f"v{number}.wav"
        soundfile.write(name, speech_like(3.0, 150.0 + number), 16000)
        work._voice((name,))
    assert [names for (names,) in work._voices] == [f"v{n}.wav" for n in range(2, VOICES_KEPT + 2)]


@pytest.mark.slow
def test_a_batch_that_is_killed_at_any_point_is_finished_by_the_next():
    for i in range(5):
        soundfile.write(f"talk{i}.wav", speech_like(1.5, 110.0 + 10 * i), 16000)
    soundfile.write("voice.wav", speech_like(3.0, 200.0), 16000)
    args = [sys.executable, "-m", "auto_voice.cli", "batch", "talk*.wav", "--voice", "voice.wav",
            "-o", "out", "--mock", "--workers", "1"]  # fmt: skip
    rng = random.Random(0)
    manifest = Path("out/manifest.jsonl")
    for _ in range(4):
        process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # From the first line on, so that the kill falls into the work and not into the start.
        size = manifest.stat().st_size if manifest.exists() else 0
        while process.poll() is None and (not manifest.exists() or manifest.stat().st_size == size):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.4)
        process.kill()
        process.wait()
    assert subprocess.run(args, capture_output=True).returncode == 0
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    done = [line["source"] for line in lines if line.get("status") == "done"]
    assert sorted(set(done)) == [f"talk{i}.wav" for i in range(5)]
    assert all(soundfile.info(f"out/talk{i}.wav").frames == 33075 for i in range(5))
    assert not [p.name for p in Path("out").iterdir() if "partial" in p.name]


def test_a_manifest_line_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "manifest.jsonl"
    with Manifest(path):
        pass
    first = path.read_text()
    for line in ("5", "null", "[1]", '"output"'):
        path.write_text(first + line + "\n")
        with (
            pytest.raises(AudioOutputError, match=r"jsonl:2 is no line of a batch manifest"),
            Manifest(path),
        ):
            pass
    path.write_text("5\n")
    with pytest.raises(AudioOutputError, match=r"jsonl:1 is no line"), Manifest(path):
        pass


def test_a_folder_that_cannot_be_made_is_told_in_words(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with (
            pytest.raises(AudioOutputError, match=r"cannot be written \(Read-only file system\)"),
            Manifest(tmp_path / "out" / "manifest.jsonl"),
        ):
            pass
        with pytest.raises(AudioOutputError, match=r"cannot be made \(Read-only file system\)"):
            _make_folder(tmp_path / "out")
