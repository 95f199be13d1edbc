"""Time, memory and bytes of a training step: full fine-tuning, methods of PEFT, and `SensiConfig` side by side.

    python examples/benchmarks/speed.py --shapes distilbert bert-base --precisions fp32 bf16
    python examples/benchmarks/speed.py --only full lora_all half --parts step
    python examples/benchmarks/speed.py --device cuda --compile

Each method has its own process, and only one process works at a time. Steps are timed in rounds, in which the methods
take turns; each is compared with full fine-tuning, the reference, in the same round. Finished measurements are in the
JSON file and are not repeated, so a run can be stopped and continued. `--seconds` starts no further group of methods
after this time.

Parts: `step` (training step and inference, unmerged and merged), `memory` (memory of a step by its use), `files`
(bytes of the adapter and time to load it), `wrap` (time to wrap with calibration data, in training steps).
The models have random weights, so nothing is downloaded and nothing is learned.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import examples_path  # noqa: F401 (for the imports from examples/)


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
PARTS = ("step", "memory", "files", "wrap")
PRECISIONS = ("fp32", "bf16")


# --- one process -----------------------------------------------------------------------------------------------------


class Worker:
    """One method in its own process. Every public method of this class is a command that the main process can send."""

    def __init__(self, shape: str, method: str, precision: str, device: str, compiled: bool, threads: int) -> None:
        import torch
        from transformers.utils import logging

        from speed_methods import METHODS, SHAPES

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch, self.name = torch, method
        self.shape, self.method, self.device = SHAPES[shape], METHODS[method], torch.device(device)
        self.bf16, self.compiled = precision == "bf16", compiled

    def setup(self, calibration: int = 0, size: int = 0, length: int = 0) -> dict[str, Any]:
        torch = self.torch
        self.batch = self.shape.batches(1, self.device, size, length)[0]
        base = self.shape.build().to(self.device)
        extra = {"calibration": self.shape.batches(calibration, self.device, size, length)} if calibration else {}
        self._wait()
        start = time.perf_counter()
        with self._autocast():
            self.model = self.method.wrap(base, self.shape, extra)
        self._wait()
        seconds = time.perf_counter() - start
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6)
        self.steps = 0
        self.forward = torch.compile(self.model) if self.compiled else self.model
        self.model.train()
        shares = {}
        if self.method.ours:
            plan = self.model.base_model.plan()
            shares = {"params": plan.params_share, "flops": plan.flops_share}
        return {"wrap_s": seconds, "trained": sum(p.numel() for p in trained), **shares}

    def step(self) -> float:
        self._wait()
        start = time.perf_counter()
        with self._autocast():
            loss = self.forward(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        if self.name == "adalora":
            self.model.base_model.update_and_allocate(self.steps)
        self.optimizer.zero_grad()
        self.steps += 1
        self._wait()
        return time.perf_counter() - start

    def infer(self) -> float:
        self.model.eval()
        inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        self._wait()
        start = time.perf_counter()
        with self.torch.inference_mode(), self._autocast():
            self.forward(**inputs)
        self._wait()
        return time.perf_counter() - start

    def merge(self) -> None:
        self.optimizer = None
        self.forward = self.model = self.model.merge_and_unload()
        if self.compiled:
            self.forward = self.torch.compile(self.model)

    def memory(self) -> dict[str, Any]:
        """Bytes of a training step by use, and the measured peak, after two warm-up steps."""
        from memory_split import (
            WeightCopies,
            free_at_once,
            held_tensors,
            peak_of_process,
            saved_bytes,
            storage_bytes,
        )

        free_at_once()
        cuda = self.device.type == "cuda"
        empty = 0 if cuda else peak_of_process(reset=True)
        self.setup()
        for _ in range(2):
            self.step()
        gc.collect()
        if cuda:
            self.torch.cuda.reset_peak_memory_stats()
            self.step()
            peak = self.torch.cuda.max_memory_allocated()
        else:
            peak_of_process(reset=True)
            self.step()
            peak = peak_of_process() - empty
        rows, columns = self.batch["input_ids"].shape
        with WeightCopies(self.model) as copies, self._autocast():
            loss = self.model(**self.batch).loss
        activations, weight_copies = saved_bytes(self.model, loss, copies.found)
        loss.backward()
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, self.torch.Tensor)]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        unit = rows * columns * self.model.config.hidden_size * (2 if self.bf16 else 4)
        return {
            "peak": peak,
            "weights": sum(storage_bytes(held_tensors(self.model)).values()),
            "gradients_and_state": sum(storage_bytes([*state, *gradients]).values()),
            "activations": activations,
            "activation_units": activations / unit,
            "weight_copies": weight_copies,
        }

    def files(self) -> dict[str, Any]:
        """Bytes of the adapter's tensors, and seconds to load it onto a base that is there."""
        from peft import PeftModel

        self.setup()
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
            del self.model, self.optimizer, self.forward
            base = self.shape.build().to(self.device)
            times = []
            for _ in range(4):
                fresh = copy.deepcopy(base)
                self._wait()
                start = time.perf_counter()
                PeftModel.from_pretrained(fresh, folder)
                self._wait()
                times.append(time.perf_counter() - start)
                del fresh
        return {"bytes": size, "load_s": min(times)}

    def wrap(self, calibration: int, size: int, length: int) -> dict[str, Any]:
        """Time to wrap with calibration data, in full fine-tuning steps of the same batch size."""
        from speed_methods import METHODS

        method = self.method
        self.method, self.name = METHODS["full"], "full"
        self.setup(0, size, length)
        self.step()
        before = [self.step() for _ in range(4)]
        self.method = method
        seconds = self.setup(calibration, size, length)["wrap_s"]
        self.method = METHODS["full"]
        self.setup(0, size, length)
        self.step()
        unit = statistics.median([*before, *(self.step() for _ in range(4))])
        return {"wrap_s": seconds, "wrap_steps": seconds / unit, "wrap_batch": f"{size} x {length}"}

    def _autocast(self) -> Any:
        return self.torch.autocast(self.device.type, self.torch.bfloat16, enabled=self.bf16)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()


def _serve(connection: Connection, arguments: dict[str, Any]) -> None:
    import warnings

    warnings.filterwarnings("ignore")
    try:
        worker = Worker(**arguments)
        connection.send(("ready", None))
        while (command := connection.recv()) is not None:
            name, fields = command
            connection.send(("done", getattr(worker, name)(**fields)))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:  # the other methods continue
        connection.send(("error", f"{type(error).__name__}: {error}"))


class Process:
    """The handle of a `Worker` in the main process."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        # Forked from a server that has imported everything, but has started no threads and not used the device.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["speed_methods"])
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, arguments), daemon=True)
        self.process.start()
        other.close()
        self._receive()

    def __call__(self, command: str, **fields: Any) -> Any:
        self.connection.send((command, fields))
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except EOFError:
            raise RuntimeError("The process of this method died, perhaps because it ran out of memory.") from None
        if kind == "error":
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        try:
            self.connection.send(None)
        except OSError:
            pass
        self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.kill()


# --- comparing -------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, float]:
    """The median and the quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def compare_steps(names: list[str], arguments: dict[str, Any], rounds: int, merges: set[str]) -> dict[str, Any]:
    """Seconds, and ratios to full fine-tuning in the same round, for `full` and the given methods.

    A method that fails has only its error, and the others continue. Without the reference, all have failed.
    """
    names = ["full", *(n for n in names if n != "full")]
    found: dict[str, Any] = {}
    processes: dict[str, Process] = {}
    warm_up = 3 if arguments["compiled"] else 1

    def ask(name: str, command: str) -> Any:
        try:
            if name not in processes:
                processes[name] = Process({**arguments, "method": name})
            return processes[name](command)
        except RuntimeError as error:
            found[name] = {"error": str(error)}
            if name in processes:
                processes.pop(name).close()
            return None

    try:
        for name in names:
            if (values := ask(name, "setup")) is not None:
                found[name] = values
        for command, key in (("step", "step"), ("infer", "infer"), ("infer", "infer_merged")):
            if key == "infer_merged":
                for name in processes.keys() & merges:
                    ask(name, "merge")
            taking = [n for n in names if n in processes and (key != "infer_merged" or n in merges | {"full"})]
            times: dict[str, list[float]] = {name: [] for name in taking}
            for _ in range(warm_up + rounds):
                for name in taking:
                    if name in processes:
                        times[name].append(ask(name, command))
            if "full" not in processes:
                failed = {"error": f"full fine-tuning, the reference, has failed: {found['full']['error']}"}
                return {name: failed if name in processes else found[name] for name in names}
            for name in taking:
                if name in processes:
                    own, full = times[name][warm_up:], times["full"][warm_up:]
                    found[name][f"{key}_s"] = spread(own)
                    found[name][f"{key}_over_full"] = spread([a / b for a, b in zip(own, full, strict=True)])
    finally:
        for process in processes.values():
            process.close()
    return found


def alone(name: str, arguments: dict[str, Any], command: str, **fields: Any) -> dict[str, Any]:
    try:
        process = Process({**arguments, "method": name})
        try:
            return process(command, **fields)
        finally:
            process.close()
    except RuntimeError as error:
        return {"error": str(error)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    from peft_sensi.utils.files import write_json_atomically

    from common import check_settings
    from speed_methods import METHODS, SHAPES

    path = Path(options.output)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    start = time.monotonic()
    names = [n for n in METHODS if options.only is None or n in options.only]
    for shape in options.shapes:
        for precision in options.precisions:
            if SHAPES[shape].needs_gpu and options.device == "cpu":
                continue
            key = "/".join([shape, precision, options.device, *(["compile"] if options.compile else [])])
            here = machine(options)
            setting = results.setdefault(key, {"methods": {}, "machine": here})
            arguments = {
                "shape": shape,
                "precision": precision,
                "device": options.device,
                "compiled": options.compile,
                "threads": options.threads,
            }
            methods = setting["methods"]
            for part in options.parts:
                open_names = [n for n in names if not _is_done(methods, n, part) and _applies(METHODS[n], n, part)]
                size = options.group if part == "step" else 1
                others = [n for n in open_names if part != "step" or n != "full"] or open_names
                for at in range(0, len(others), size):
                    if options.seconds and time.monotonic() - start > options.seconds:
                        return results
                    check_settings(setting["machine"], here, path)
                    group = others[at : at + size]
                    if part == "step":
                        merges = {n for n in group if METHODS[n].merges}
                        found = compare_steps(group, arguments, options.rounds, merges)
                    elif part == "wrap":
                        batch = options.wrap_batch
                        found = {group[0]: alone(group[0], arguments, "wrap", calibration=40, **batch)}
                    else:
                        found = {group[0]: alone(group[0], arguments, part)}
                    for name, values in found.items():
                        if name == "full" and part == "step" and _is_done(methods, "full", "step"):
                            continue  # keep the reference of the first group
                        methods.setdefault(name, {})[part] = values
                        print(f"{key} {part:6} {name:14} {_short(values)}", flush=True)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json_atomically(path, results)
    return results


def _is_done(methods: dict[str, Any], name: str, part: str) -> bool:
    """Whether a part of a method is measured. One that failed is measured again."""
    return "error" not in methods.get(name, {}).get(part, {"error": ""})


def _applies(method: Any, name: str, part: str) -> bool:
    return method.saves if part == "files" else method.ours if part == "wrap" else True


def _short(values: dict[str, Any]) -> str:
    found = {k: v["median"] if isinstance(v, dict) else v for k, v in values.items()}
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in found.items())


def machine(options: argparse.Namespace) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    from peft_sensi.utils.timing import processor_name

    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    return {
        "device": device,
        "cpu": processor_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def check_names(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with an error if a shape or method does not exist. Otherwise nothing would be measured."""
    from speed_methods import METHODS, SHAPES

    for option, given, known in (("--shapes", options.shapes, SHAPES), ("--only", options.only or (), METHODS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{option}: there is no {', '.join(unknown)}; choose from {', '.join(known)}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["distilbert", "bert-base", "decoder-1b"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="fp32, and bf16 where it is faster")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--only", nargs="+", help="short names of the methods to measure; all by default")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default cuda if available")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--group", type=int, default=5, help="number of methods that take turns with the reference")
    parser.add_argument("--seconds", type=float, default=0, help="start no further group of methods after this time")
    parser.add_argument("--wrap-batch", default="8x64", help="rows x tokens of the calibration batches of `wrap`")
    parser.add_argument("--output", default="speed.json")
    parser.add_argument("--page", help="Markdown page whose generated part is replaced")
    parser.add_argument(
        "--quick", action="store_true", help="check that everything runs, with a tiny model and few rounds"
    )
    options = parser.parse_args(arguments)
    check_names(parser, options)
    if options.quick:
        options.shapes, options.precisions, options.rounds, options.threads = ["tiny"], ["fp32"], 2, 1
    rows, _, tokens = options.wrap_batch.partition("x")
    options.wrap_batch = {"size": int(rows), "length": int(tokens)}
    if options.quick:
        options.wrap_batch = {"size": 2, "length": 16}
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.precisions is None:
        from peft_sensi.utils.precision import bf16_pays

        options.precisions = ["fp32", "bf16"] if bf16_pays(options.device) else ["fp32"]
    from runner import readable_errors

    with readable_errors():
        results = run(options)
    from speed_table import write_table

    text = write_table(results, options.page)
    if not options.page:
        print(text)
    return results


if __name__ == "__main__":
    main()
