# SPDX-License-Identifier: Apache-2.0
"""What the reliability tests share: tiny checkpoints, and children that are forked and may die."""

import builtins
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


sys.path += [str(Path(__file__).parents[1] / "unit" / folder) for folder in ("bridge", "release_checkpoint")]
# For the server below.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
# Before Bridge is imported: pools of threads don't survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import torch.distributed as dist
from tiny_models import PAYLOAD, save_hf_model, weights

from megatron.bridge import AutoBridge
from megatron.bridge.host.processes import _LOST
from megatron.bridge.release_checkpoint.layout import TRACKER, read_tracker, resolve_checkpoint
from megatron.bridge.training.mlm_compat.checkpoints import read_megatron_lm_args


PAYLOAD = PAYLOAD | {"hf"}
__all__ = ["PAYLOAD", "TRACKER", "AutoBridge", "read_megatron_lm_args", "save_hf_model", "weights"]
# Else each fork would load them.
for lazy in ("training.checkpointing", "training.model_load_save", "training.tokenizers.tokenizer"):
    importlib.import_module(f"megatron.bridge.{lazy}")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def digest(root: Path) -> str | None:
    """Every bit of the weights that the tracker of `root` names, and the args; None where there is no tracker."""
    if read_tracker(root) is None:
        return None
    payload = Path(resolve_checkpoint(root))
    found = hashlib.sha256(repr(read_megatron_lm_args(payload)).encode())
    for key, tensor in sorted(weights(payload).items()):
        found.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _work(work: Callable[[], Any], send: Callable[[bytes], Any]) -> None:
    """Call `work` silently in this process, a child, send what it returns or raises, and end."""
    status = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            said = {"result": work()}
            status = 0
        except BaseException as error:
            said = {"error": type(error).__name__, "message": str(error)}
        send(json.dumps(said).encode())
    finally:
        os._exit(status)


def forked(work: Callable[[], Any]) -> tuple[int, int]:
    """Run `work` in a fork of this process, which must have no threads; returns the child's id and a pipe."""
    result, to_parent = os.pipe()
    child = os.fork()
    if not child:
        _work(work, lambda said: os.write(to_parent, said))
    os.close(to_parent)
    return child, result


def run_forked(work: Callable[[], Any]) -> dict[str, Any]:
    """Run `work` in a fork of this process; returns its `result`, or the name of its `error` and the `message`."""
    child, result = forked(work)
    with os.fdopen(result, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else KILLED


def meeting_place() -> dist.TCPStore:
    """Return where two ranks meet: no file, which a full disk would not take."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def on_two_ranks(work: Callable[[], Any]) -> Any:
    """Call `work` on two ranks, forks of this process, which is a fork itself. Return or raise what they say.

    Of two that fail, one may only have lost the other, or the folder that it writes to.
    """
    store = meeting_place()
    seen = []
    for child, result in [forked(partial(on_rank, store.port, rank, work)) for rank in (0, 1)]:
        with os.fdopen(result, "rb") as pipe:
            seen.append(json.loads(pipe.read()))
        os.waitpid(child, 0)
    told = [each for each in seen if not _LOST.search(each.get("message", ""))]
    failed = ["error" in (each.get("result") or each) for each in told]
    assert told and (told == [told[0]] * 2 or all(failed)), seen
    if "error" in told[0]:
        raise getattr(builtins, told[0]["error"])(told[0]["message"])
    return told[0]["result"]


def on_rank(port: int, rank: int, work: Callable[[], Any]) -> Any:
    """Call `work` on one of two ranks."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    return work()


def alone(work: Callable[[], Any]) -> Any:
    """Call `work` on the only rank."""
    return work()


class Child:
    """A process that runs `work`, forked from one that has imported Bridge and done nothing else.

    The process of the tests is none to fork from: others have run threads and process groups in it.

    Args:
        work: A function of a module, or a partial of one.
    """

    def __init__(self, work: Callable[[], Any]):
        self.pipe, to_parent = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=_work, args=(work, to_parent.send_bytes))
        self.process.start()
        to_parent.close()

    def answer(self) -> dict[str, Any]:
        """Wait for its end; returns its `result`, or the name of its `error` and the `message`."""
        try:
            said = json.loads(self.pipe.recv_bytes())
        except EOFError:
            said = KILLED
        self.process.join()
        return said


def run(work: Callable[[], Any]) -> dict[str, Any]:
    return Child(work).answer()


KILLED = {"error": "killed"}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["llama_alone", "checkpoints"])
# Else a collection in a fork, and every import has two, touches and so copies all that was imported.
gc.freeze()
