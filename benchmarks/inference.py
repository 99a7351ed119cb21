"""Generate with several engines and one set of random weights, alternately, and compare their speed.

    python benchmarks/inference.py --upstream CHECKOUT --models d4 --threads 1

CHECKOUT is nanochat at commit 796f845 (October 2025), whose architecture ours is. Where `transformers` can
be imported, its NanoChat takes part too. All engines decode greedily, in this process, one after the other
in every round; nothing ends before its length. Each measurement is a JSON line: tokens per second of wall
time and of CPU time, by the fastest round. Ratios come last, theirs to ours, of the same run.

- prefill: one prompt of 512 tokens, up to its first token (so this is the time to first token, too).
- decode: tokens after the first, that many answers to one prompt of 64 tokens.
- load: 32 requests of mixed lengths, with ours: together, and one after the other.

peak_mb is the most that one round of the engine added to the process's resident memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.inference.batch import Batch
from nanochat.inference.calculator import Calculator
from nanochat.inference.formats import WeightFormat
from nanochat.inference.generation import Request
from nanochat.inference.quantized import quantize
from nanochat.inference.sampling import Sampling
from nanochat.model.gpt import GPT
from nanochat.recipes import SPECIAL_TOKENS, Model, named_recipes

VOCABULARIES = {"d4": 10_000, "d12": 65_536}
PREFILL_TOKENS = 512
DECODE_PROMPT_TOKENS = 64
OURS = "ours-fp32"

# Where a measurement may start its clock: everything before the call of it is not counted.
Start = Callable[[], None]


class Vocabulary:
    """As much of a tokenizer as an engine needs. No special token is ever drawn."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._specials = {name: vocab_size + index for index, name in enumerate(SPECIAL_TOKENS)}
        self.bos = self.special("<|bos|>")

    def special(self, name: str) -> int:
        return self._specials[name]

    encode_special = special  # upstream's name

    def get_bos_token_id(self) -> int:  # upstream's name
        return self.bos

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"x" * len(list(ids))


class Ours:
    def __init__(self, model: GPT, vocab_size: int) -> None:
        self.model = model
        self.vocabulary = Vocabulary(vocab_size)

    def batch(self, max_rows: int) -> Batch:
        return Batch(self.model, self.vocabulary, Calculator(), max_rows=max_rows)  # type: ignore[arg-type]

    def generate(self, prompt: list[int], answers: int, tokens: int, first: Start) -> None:
        batch = self.batch(answers)
        # The step that gives the first token gives the second, too: the clock starts with that.
        sampling = Sampling(max_tokens=tokens + 1 if tokens > 1 else 1)
        rows = batch.add(Request(prompt=prompt, sampling=sampling, n=answers)).rows
        while not batch.idle:
            batch.step()
            if len(rows[0].tokens) <= 2:
                first()

    def load(self, requests: list[Request], max_rows: int) -> None:
        batch = self.batch(max_rows)
        for request in requests:
            batch.add(request)
        while not batch.idle:
            batch.step()


class Upstream:
    """nanochat's own engine. Its package has our package's name, so it is imported in our place."""

    def __init__(self, checkout: Path, model: GPT) -> None:
        hidden = {
            name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "nanochat"
        }
        sys.path.insert(0, str(checkout))
        try:
            gpt = importlib.import_module("nanochat.gpt")
            engine = importlib.import_module("nanochat.engine")
        finally:
            sys.path.remove(str(checkout))
            for name in [name for name in sys.modules if name.split(".")[0] == "nanochat"]:
                del sys.modules[name]
            sys.modules.update(hidden)
        config = model.config
        twin = gpt.GPT(
            gpt.GPTConfig(
                sequence_len=config.context,
                vocab_size=model.vocab_size,
                n_layer=config.depth,
                n_head=config.heads,
                n_kv_head=config.kv_heads,
                n_embd=config.width,
            )
        )
        names = {"wte.": "transformer.wte.", "blocks.": "transformer.h."}
        state = {}
        for name, weight in model.state_dict().items():
            ours = next((prefix for prefix in names if name.startswith(prefix)), None)
            state[names[ours] + name.removeprefix(ours) if ours else name] = weight
        missing, unexpected = twin.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert all(name in {"cos", "sin"} for name in missing), missing
        self._engine = engine.Engine(twin.eval(), Vocabulary(model.vocab_size))

    def generate(self, prompt: list[int], answers: int, tokens: int, first: Start) -> None:
        steps = self._engine.generate(prompt, num_samples=answers, max_tokens=tokens, temperature=0.0)
        for number, _ in enumerate(steps):
            if number == 0:
                first()


class Transformers:
    """`transformers`' NanoChat with its own generation loop."""

    def __init__(self, model: GPT) -> None:
        from transformers import NanoChatConfig, NanoChatForCausalLM

        config = model.config
        twin = NanoChatForCausalLM(
            NanoChatConfig(
                vocab_size=model.vocab_size,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                max_position_embeddings=config.context,
                rms_norm_eps=torch.finfo(torch.float32).eps,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )
        names = [
            ("wte.", "model.embed_tokens."),
            ("blocks.", "model.layers."),
            (".attn.c_proj", ".self_attn.o_proj"),
            (".attn.c_", ".self_attn."),
            (".mlp.c_fc", ".mlp.fc1"),
            (".mlp.c_proj", ".mlp.fc2"),
        ]
        state = {}
        for name, weight in model.state_dict().items():
            for ours, theirs in names:
                name = name.replace(ours, theirs)
            name = name.replace("self_attn.q.", "self_attn.q_proj.").replace(
                "self_attn.k.", "self_attn.k_proj."
            )
            state[name.replace("self_attn.v.", "self_attn.v_proj.")] = weight
        twin.load_state_dict(state, strict=True)
        self._model = twin.eval()

    @torch.inference_mode()
    def generate(self, prompt: list[int], answers: int, tokens: int, first: Start) -> None:
        class Streamer:  # told of the prompt, then of each token
            calls = 0

            def put(self, _: Any) -> None:
                self.calls += 1
                if self.calls == 2:
                    first()

            def end(self) -> None:
                pass

        ids = torch.tensor([prompt] * answers)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=Streamer() if answers == 1 else None,
        )


@dataclass
class Timing:
    wall_s: float
    cpu_s: float
    peak_mb: float


def timed(work: Callable[[Start], None], from_first: bool) -> Timing:
    """Time all of `work`, or what comes after it called its argument for the last time."""
    resident = reset_peak()
    began = [time.perf_counter(), time.process_time()]

    def first() -> None:
        if from_first:
            began[:] = [time.perf_counter(), time.process_time()]

    work(first)
    return Timing(
        time.perf_counter() - began[0], time.process_time() - began[1], (peak_kib() - resident) / 1024
    )


def reset_peak() -> int:
    """Resident KiB now; from here on `peak_kib` counts anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_kib() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def random_model(config: Model, vocab_size: int) -> GPT:
    model = GPT(config, vocab_size)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.02
    return model.eval()


def mixed_requests(vocab_size: int, context: int) -> list[Request]:
    """32 requests: prompts of 16 to 384 tokens, answers of 16 to 128."""
    random_ = random.Random(0)
    return [
        Request(
            prompt=[
                random_.randrange(vocab_size) for _ in range(random_.randint(16, min(384, context // 2)))
            ],
            sampling=Sampling(max_tokens=random_.randint(16, 128)),
        )
        for _ in range(32)
    ]


def report(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def rounds(
    name: dict[str, Any], tokens: int, work: dict[str, Callable[[Start], None]], count: int, from_first: bool
) -> None:
    """Run every engine once a round, and report each one's fastest round and the ratios to ours."""
    timings: dict[str, list[Timing]] = {engine: [] for engine in work}
    for _ in range(count):
        for engine, run in work.items():
            timings[engine].append(timed(run, from_first))
    for engine, measured in timings.items():
        wall, cpu = min(t.wall_s for t in measured), min(t.cpu_s for t in measured)
        report(
            {
                **name,
                "engine": engine,
                "tokens": tokens,
                "tokens_per_s": round(tokens / wall, 1),
                "tokens_per_cpu_s": round(tokens / cpu, 1),
                "seconds": round(wall, 4),
                "peak_mb": round(max(t.peak_mb for t in measured), 1),
            }
        )
    first = next(iter(work))
    for engine in list(work)[1:]:
        pairs = list(zip(timings[engine], timings[first], strict=True))
        report(
            {
                **name,
                "ratio": f"{engine} to {first}",
                "seconds": round(statistics.median(a.wall_s / b.wall_s for a, b in pairs), 3),
                "cpu_seconds": round(statistics.median(a.cpu_s / b.cpu_s for a, b in pairs), 3),
                "fastest_cpu_seconds": round(
                    min(a.cpu_s for a, _ in pairs) / min(b.cpu_s for _, b in pairs), 3
                ),
            }
        )


def bench(name: str, arguments: argparse.Namespace) -> None:
    config, vocab_size = named_recipes()[name].model, VOCABULARIES[name]
    engines: dict[str, Ours | Upstream | Transformers] = {}
    model = random_model(config, vocab_size)
    upstream = Upstream(arguments.upstream, model) if arguments.upstream else None
    hugging_face = Transformers(model) if importlib.util.find_spec("transformers") else None
    engines[OURS] = Ours(random_model(config, vocab_size).fuse(), vocab_size)
    if "bf16" in arguments.dtypes:
        engines["ours-bf16"] = Ours(random_model(config, vocab_size).to(torch.bfloat16).fuse(), vocab_size)
    for format in (WeightFormat.INT8, WeightFormat.W8A8, WeightFormat.INT4):
        if format in arguments.dtypes:
            small = quantize(random_model(config, vocab_size).fuse(), format)
            engines[f"ours-{format}"] = Ours(small, vocab_size)
    if upstream is not None:
        engines["upstream"] = upstream
    if hugging_face is not None:
        engines["transformers"] = hugging_face
    random_ = random.Random(1)
    long, short = (
        [random_.randrange(vocab_size) for _ in range(length)]
        for length in (PREFILL_TOKENS, DECODE_PROMPT_TOKENS)
    )

    def of_all(prompt: list[int], answers: int, tokens: int) -> dict[str, Callable[[Start], None]]:
        def of(engine: Ours | Upstream | Transformers) -> Callable[[Start], None]:
            return lambda first: engine.generate(prompt, answers, tokens, first)

        # transformers' loop tells when the first token is there for one answer only.
        return {
            name: of(engine)
            for name, engine in engines.items()
            if answers == 1 or not isinstance(engine, Transformers)
        }

    about = {"model": name, "threads": torch.get_num_threads()}
    if "prefill" in arguments.measure:
        rounds({**about, "measure": "prefill"}, PREFILL_TOKENS, of_all(long, 1, 1), arguments.rounds, False)
    if "decode" in arguments.measure:
        for answers in arguments.batches:
            tokens = max(8, arguments.tokens // max(1, answers // 8))
            what = {**about, "measure": "decode", "batch": answers}
            work = of_all(short, answers, tokens + 1)
            rounds(what, tokens * answers, work, arguments.rounds, True)
    if "load" in arguments.measure:
        ours = engines[OURS]
        assert isinstance(ours, Ours)
        requests = mixed_requests(vocab_size, config.context)
        tokens = sum(request.sampling.max_tokens for request in requests)
        load: dict[str, Callable[[Start], None]] = {
            "together": lambda first: ours.load(requests, 32),
            "one after the other": lambda first: ours.load(requests, 1),
        }
        rounds({**about, "measure": "load"}, tokens, load, max(1, arguments.rounds // 3), False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upstream", type=Path, help="a checkout of nanochat at 796f845")
    parser.add_argument("--models", nargs="+", choices=sorted(VOCABULARIES), default=["d4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["fp32", "bf16", "int8", "w8a8", "int4"], default=["fp32"]
    )
    parser.add_argument(
        "--measure", nargs="+", choices=["prefill", "decode", "load"], default=["prefill", "decode", "load"]
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer at batch 1 and 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report({"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()})
    for model in arguments.models:
        bench(model, arguments)


if __name__ == "__main__":
    main()
