"""Loads mutated adapters in processes that may die: `serve` runs in a process of `test_fuzz.py`.

A job is `{"id": 1, "seed": 7}` (mutations drawn from the seed) or `{"id": 1, "adapter": "trim", "fields": {...},
"weights": ...}` (fields of the config to be replaced, the weights file in base64). The answer to a job is `{"id": 1,
"outcome": ..., "detail": ...}`, where the outcome is `loaded`, `refused` (`SensiLoadError`), `theirs` (an error that
PEFT raised before any of our code ran) or a failure: `wrong error`, `dirty base`, `bad model`, `crash`, `hang` (5 s of
processor time, or no answer for very long), `allocation` (more than twice the base).
Jobs run in forks of this process, so that a crash costs nothing but the job's own fork.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import resource
import select
import signal
import struct
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from processes import PATIENCE, keep_tqdm_from_forks
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tiny import tiny_batches, tiny_model

import peft_sensi
from peft_sensi import SensiConfig, SensiLoadError
from peft_sensi.tuner.checkpoint import plan_to_tensor


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Adapters = dict[str, tuple[bytes, bytes]]  # config and weights by name
OURS = str(Path(peft_sensi.__file__).parent)
GOOD = ("loaded", "refused", "theirs")
SECONDS = 5.0

# One adapter of each form of file: slices with and without trimming, low-rank terms and single values, bits, codes,
# gates.
ADAPTERS: dict[str, dict[str, Any]] = {
    "trim": {"budget": 0.5},
    "both": {"budget": {"flops": 0.6, "trainable": 0.02}},
    "dsee": {"update": "low_rank+sparse", "rank": 2, "sparse": 5, "target_modules": ["query", "value"]},
    "mask": {"update": "mask", "sparsity": 0.3},
    "bfloat16": {"budget": {"flops": 0.6, "trainable": 0.02}},
    "int8": {"update": "low_rank+sparse", "rank": 2, "scale": 0.5, "sparse": 5, "target_modules": ["query", "value"]},
    "scores": {"update": "mask", "sparsity": 0.3, "target_modules": ["query"]},
    "cuts": {"budget": 0.5, "schedule": {"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 2}},
    "blocks": {"budget": 0.5, "blocks": [
        {"layer": "encoder.layer.*", "q": "attention.self.query", "k": "attention.self.key",
         "v": "attention.self.value", "o": "attention.output.dense", "up": "intermediate.dense",
         "down": "output.dense", "head_size": "attention.self.attention_head_size",
         "head_counts": ["attention.self.num_attention_heads"], "head_widths": ["attention.self.all_head_size"]}]},
}  # fmt: skip

_ODD = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**18, 10**400, -(10**400), 1.5, 0.0, -0.5, float("nan"),
    float("inf"), float("-inf"), 1e308, "", "x", "a" * 5000, ".*", "(a+)+$", "((a|a)*)*b", "(.*)*query", "all-linear",
    "../../../etc/passwd", "os.system", "__class__", "weight", "training", "all", "none", "AAAA", "bits", "dense",
    "low_rank", "mask", "sparse", "low_rank+sparse", "tensor", "weight", "unit", [], [[]], [1], [None], ["x"],
    ["query"], ["classifier"], ["(.*a)*b"], ["bert"], ["((x|x)+)+$"], ["norms"], ["embeddings"], ["biases"],
    {}, {"x": 1},
    {"params": 0.5}, {"params": 10**400}, {"phase": "cut"}, {"phase": "cut", "start": 0, "end": 1, "cuts": 10**9},
    {"phase": "draw_mask", "at": 0.5}, {"phase": "freeze_dense", "epochs": 1}, {"shapes": {}, "marks": []},
    [{"layer": "*" * 200}], [{"layer": "encoder.layer.*", "up": "intermediate.dense", "down": "output.dense"}],
    [{"layer": "(a+)+", "up": "x", "down": "y"}], {"base_model_class": "system", "parent_library": "os"},
]  # fmt: skip


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def templates() -> Adapters:
    """Config and weights, as bytes, of each adapter."""
    found = {}
    for name, fields in ADAPTERS.items():
        config = SensiConfig(task_type="SEQ_CLS", score="magnitude", init_weights=True, **fields)
        model = get_peft_model(new_base(), config)
        if name in ("mask", "bfloat16", "int8"):
            model.base_model.compress("bits" if name == "mask" else name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found[name] = tuple((Path(folder) / file).read_bytes() for file in (CONFIG, WEIGHTS))
    return found


def new_base() -> torch.nn.Module:
    # Most of it is the vocabulary, so that twice the base is room for what PyTorch allocates by the way.
    return tiny_model(num_hidden_layers=1, vocab_size=120_000)


def mutated(seed: int, files: Adapters) -> tuple[bytes, bytes]:
    """One to three mutations of one of the adapters."""
    draw = random.Random(seed)
    config, weights = files[draw.choice(sorted(files))]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        try:
            kind = draw.randrange(10)
            if kind <= 1:
                config = _change_field(draw, config)
            elif kind == 2:
                config = _change_inside(draw, config)
            elif kind == 3:
                config = _change_bytes(draw, config)
            elif kind == 4:
                weights = _change_header(draw, weights)
            elif kind == 5:
                weights = _change_header_bytes(draw, weights)
            elif kind == 6:
                weights = _change_bytes(draw, weights)
            elif kind <= 8:
                weights = _change_tensors(draw, weights)
            else:
                weights = files[draw.choice(sorted(files))][1]
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError, struct.error):
            pass  # an earlier mutation left nothing to mutate in this way
        except BaseException as error:
            if type(error).__name__ != "SafetensorError":
                raise
    if draw.random() < 0.5:
        with contextlib.suppress(Exception):
            weights = tied(config, weights)
    return config, weights


def tied(config: bytes, weights: bytes) -> bytes:
    """The values with the config's plan and without its mark, so that what the mark would show is not refused yet."""
    tensors = load_tensors(weights)
    tensors["base_model.model.sensi_plan"] = plan_to_tensor(json.loads(config)["plan"])
    return save_tensors(tensors, metadata={"format": "pt"})


def _change_field(draw: random.Random, config: bytes) -> bytes:
    values = json.loads(config)
    name = draw.choice([*sorted(values), "invented", "calibration", "runtime_config"])
    how = draw.randrange(10)
    if how == 0:
        values.pop(name, None)
    elif how == 1:
        return (
            json.dumps(values)
            .replace("{", '{"' + name + '": ' + deep(draw.choice((3, 900, 100_000))) + ",", 1)
            .encode()
        )
    else:
        values[name] = draw.choice(_ODD)
    return json.dumps(values).encode()


def _change_inside(draw: random.Random, config: bytes) -> bytes:
    values = json.loads(config)
    place: Any = values
    key: Any = draw.choice([k for k in ("plan", "fingerprint", "blocks", "schedule", "budget") if values.get(k)])
    while isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.85:
        place = place[key]
        key = draw.choice(sorted(place)) if isinstance(place, dict) else draw.randrange(len(place))
    how = draw.randrange(5)
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place, dict):
        place[draw.choice(("x", "bert.encoder.layer.7.heads", ""))] = place[key]
    elif how == 2 and isinstance(place[key], str):
        text = list(place[key] or "A")
        text[draw.randrange(len(text))] = draw.choice("ABCZaz09+/=! *")
        place[key] = "".join(text) * draw.choice((1, 1, 1, 1000))
    elif how == 3 and isinstance(place[key], (int, float)):
        place[key] = draw.choice((place[key] + 1, -place[key], place[key] * 10**9, place[key] - 1))
    else:
        place[key] = draw.choice(_ODD)
    return json.dumps(values).encode()


def _change_bytes(draw: random.Random, data: bytes) -> bytes:
    how = draw.randrange(5)
    if how == 0:
        return data[: draw.randrange(len(data) + 1)]
    if how == 1:
        return data + draw.randbytes(draw.choice((1, 8, 4096)))
    if how == 2:
        at = draw.randrange(len(data))
        return data[:at] + draw.randbytes(draw.randrange(1, 16)) + data[at:]
    changed = bytearray(data)
    for _ in range(draw.choice((1, 2, 20))):
        changed[draw.randrange(len(changed))] = draw.choice((0, 255, 127, draw.randrange(256)))
    return bytes(changed)


def _change_header(draw: random.Random, weights: bytes) -> bytes:
    size = struct.unpack("<Q", weights[:8])[0]
    header, body = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    name = draw.choice([n for n in sorted(header) if n != "__metadata__"])
    entry = header[name]
    how = draw.randrange(8)
    if how == 0:
        entry["dtype"] = draw.choice(
            ("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X", 5)
        )
    elif how == 1:
        entry["shape"] = draw.choice(
            ([], [0], [-1], [2**63], [2**32, 2**32], [1] * 500, [1.5], "x", None, [*entry["shape"], 1],
             entry["shape"][::-1], [10**9, 10**9])
        )  # fmt: skip
    elif how == 2:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = draw.choice(
            ([0, 2**60], [end, start], [-1, 5], [start, end + 1], [0], "x", [start, 0])
        )
    elif how == 3:
        other = draw.choice([n for n in sorted(header) if n != "__metadata__"])
        header[other], header[name] = header[name], header[other]
    elif how == 4:
        header[draw.choice(("x", name + ".default", "../" + name, "base_model.model." + name, ""))] = header.pop(name)
    elif how == 5:
        header["__metadata__"] = draw.choice((None, 5, {"x": 1}, {"format": "tf"}, {"format": "x" * 10**5}))
    elif how == 6:
        header[name] = draw.choice(_ODD)
    else:
        header.pop(name)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _change_header_bytes(draw: random.Random, weights: bytes) -> bytes:
    size = struct.unpack("<Q", weights[:8])[0]
    if draw.random() < 0.3:
        other = draw.choice((0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1, len(weights)))
        return struct.pack("<Q", other) + weights[8:]
    header = _change_bytes(draw, weights[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + weights[8 + size :]


def _change_tensors(draw: random.Random, weights: bytes) -> bytes:
    tensors = {name: tensor.clone() for name, tensor in load_tensors(weights).items()}
    name = draw.choice(sorted(tensors))
    if draw.random() < 0.5:  # where there is most to be wrong
        rare = [n for n in sorted(tensors) if not tensors[n].is_floating_point() or n.endswith(("_up", "_down"))]
        name = draw.choice(rare)
    tensor, how = tensors[name], draw.randrange(12)
    flat = tensor.view(-1)
    at = draw.randrange(max(1, flat.numel()))
    if how <= 2 and tensor.is_floating_point():
        flat[at] = draw.choice((float("nan"), float("inf"), -float("inf"), 1e38, 0.0))
    elif how <= 4 and not tensor.is_floating_point():
        most = torch.iinfo(tensor.dtype).max
        flat[at] = draw.choice((0, 1, 2, most, torch.iinfo(tensor.dtype).min, int(flat[at - 1]), most // 2, 255))
    elif how == 5:
        tensors[name] = tensor.to(draw.choice((torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8)))
    elif how == 6:
        tensors[name] = draw.choice((tensor[:-1], tensor[None], tensor[:0], torch.cat([tensor, tensor]), tensor.sum()))
    elif how == 7:
        tensors[name] = flat.flip(0).view(tensor.shape)
    elif how == 8:
        del tensors[name]
    elif how == 9:
        tensors[draw.choice(("x", name + ".x", "base_model.model.bert.pooler.dense.weight", "sensi_plan"))] = tensor
    elif how == 10:
        other = draw.choice(
            ("bert.encoder.layer.0.output.dense.base_layer.weight", "bert.sensi_weight", "a.sensi_junk")
        )
        tensors["base_model.model." + other] = torch.zeros(32, 64)
    else:
        tensors[name] = torch.full_like(tensor, draw.choice((0, 1, 100)))
    return save_tensors({n: t.contiguous() for n, t in tensors.items()}, metadata={"format": "pt"})


# -- one job ----------------------------------------------------------------------------------------------------------


def run_job(files: tuple[bytes, bytes], base: torch.nn.Module, folder: Path) -> tuple[str, str, bool]:
    """Outcome, detail, and whether the base can be used for another job."""
    for name, data in zip((CONFIG, WEIGHTS), files, strict=True):
        (folder / name).write_bytes(data)
    versions = [(p.data_ptr(), p._version) for p in base.parameters()]
    try:
        model = PeftModel.from_pretrained(base, folder)
    except SensiLoadError as error:
        outcome, detail = "refused", str(error)
        if "adapter_" not in detail and WEIGHTS not in detail and str(folder) not in detail:
            return "wrong error", f"names no file: {detail}", False
    except MemoryError as error:
        return "allocation", repr(error), False
    except BaseException as error:  # a panic of safetensors is no `Exception`
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        # `peft_calls` only hands calls of PEFT on.
        ours = any(name.startswith(OURS) and not name.endswith("peft_calls.py") for name in frames)
        outcome, detail = "wrong error" if ours else "theirs", f"{type(error).__name__}: {error}"
        if "allocate" in detail:
            outcome = "allocation"
        if ours:
            detail += "".join(traceback.format_tb(error.__traceback__)[-3:])
    else:
        return check_model(model, base, versions)
    if not is_plain(base) or versions != [(p.data_ptr(), p._version) for p in base.parameters()]:
        return "dirty base", detail, False
    return outcome, detail, True


def is_plain(model: torch.nn.Module) -> bool:
    return not any(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in model.modules())


def check_model(model: PeftModel, base: torch.nn.Module, versions: list) -> tuple[str, str, bool]:
    """What was loaded must work, be finite, agree with its plan, and leave the base as it was."""
    config = model.peft_config["default"]
    try:
        with torch.no_grad():
            shape = model(**tiny_batches(1, size=2, length=6, labels=False)[0]).logits.shape
        if tuple(shape) != (2, 3):
            return "bad model", f"logits {tuple(shape)}", False
        bad = [n for n, p in model.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]
        if bad:
            return "bad model", f"{bad[0]} is not finite", False
        if model.base_model.plan().to_dict() != config.plan:
            return "bad model", "another plan", False
        if not config.keep_base:
            return "loaded", "without its base", False
        plain = model.unload()
    except Exception as error:
        return "bad model", "".join(traceback.format_exception(error)[-4:]), False
    same = is_plain(plain) and [(p.data_ptr(), p._version) for p in plain.parameters()] == versions
    return ("loaded", "", True) if same else ("dirty base", "after unload", False)


def child(jobs: list[dict[str, Any]], answers: int, made: Adapters, base: torch.nn.Module) -> None:
    """Answers jobs until one spoils the base; never returns."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    twice = 2 * sum(p.numel() * p.element_size() for p in base.parameters())
    resource.setrlimit(resource.RLIMIT_AS, (used + twice, used + twice))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for job in jobs:
            os.write(answers, (json.dumps({"start": job["id"]}) + "\n").encode())
            files = mutated(job["seed"], made) if "seed" in job else None
            if files is None:
                config, weights = made[job["adapter"]]
                config = json.dumps({**json.loads(config), **job.get("fields", {})}).encode()
                with contextlib.suppress(Exception):
                    weights = tied(config, weights)
                files = (config, base64.b64decode(job["weights"]) if "weights" in job else weights)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome, detail, goes_on = run_job(files, base, Path(folder))
            answer = {"id": job["id"], "outcome": outcome, "detail": detail[:1500]}
            os.write(answers, (json.dumps(answer) + "\n").encode())
            if not goes_on:
                break
    os._exit(0)


def run_jobs(jobs: list[dict[str, Any]], made: Adapters, base: torch.nn.Module) -> list[dict[str, Any]]:
    """Forks, watches, and forks again after a death. Returns an answer for each job."""
    found = []
    while jobs:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            try:
                child(jobs, writer, made, base)
            finally:
                traceback.print_exc()
                os._exit(1)
        os.close(writer)
        running, spent, buffer, verdict, heard = None, 0.0, b"", "crash", time.monotonic()
        while True:
            ready, _, _ = select.select([reader], [], [], 0.5)
            if ready:
                data, heard = os.read(reader, 65536), time.monotonic()
                if not data:
                    break
                *lines, buffer = (buffer + data).split(b"\n")
                for line in map(json.loads, lines):
                    if "start" in line:
                        running, spent = line["start"], processor_time(pid)
                    else:
                        running = None
                        found.append(line)
                        jobs = jobs[1:]
            elif time.monotonic() - heard > PATIENCE or (
                running is not None and processor_time(pid) - spent > SECONDS
            ):
                verdict = "hang"
                os.kill(pid, signal.SIGKILL)
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        if running is not None:
            found.append({"id": running, "outcome": verdict, "detail": f"status {status}"})
            jobs = jobs[1:]
    return found


def processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve(connection: Connection) -> None:
    """Receives lists of jobs, and sends the list of answers for each, until it receives `None`."""
    torch.set_num_threads(1)
    keep_tqdm_from_forks()
    made, base = templates(), new_base()
    # Whatever is loaded lazily is loaded before a limit is set.
    with tempfile.TemporaryDirectory() as folder:
        for files in made.values():
            outcome, detail, _ = run_job(files, base, Path(folder))
            assert outcome == "loaded", (outcome, detail)
    while (jobs := connection.recv()) is not None:
        connection.send(run_jobs(jobs, made, base))
