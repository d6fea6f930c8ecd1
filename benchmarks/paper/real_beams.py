"""How far apart a real model's beams are, and the certainty at which the synthetic ones are as far apart.

The experiment is figure 15's, with its clock, its counting and its kinds of load. Only what beams find likely comes
from the bundled model. Prompts are pieces of the text that it was not trained on; answers end where the load says.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers

from benchmarks.paper.beams import LOADS, WIDTHS, Sharing, saved_blocks
from benchmarks.paper.model_worker import SHIFT, ModelWorker
from benchmarks.paper.policies import PAGEWIRE, simulate
from benchmarks.simulator.likelihoods import Likelihoods
from benchmarks.simulator.profiles import A100_OPT_13B, WorkerProfile
from benchmarks.simulator.simulation import Arrival
from pagewire.bundled import BUNDLED_MODEL
from tools.bundled_model.corpus import read_corpus
from tools.bundled_model.train import token_stream
from worker.models.base import PagedModel
from worker.models.loader import load_model

Result = dict[str, Any]

SECONDS = {"sharegpt-like": 120.0, "alpaca-like": 10.0}
"""Of each load: 36 and 50 searches, because a real model takes its time."""
SEEDS = (0, 1)
"""Of lengths, of the times of arrivals and of the places of prompts in the text."""
CONTEXT = 1024
DISTANCE = "tokens_apart_mean_of_pairs"
CERTAINTIES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97)
LENGTHS = (0, 32, 64, 128, 256, 512, CONTEXT)
"""Output lengths between which means are taken."""


def held_out_text() -> list[int]:
    """The documents that the bundled model was not trained on, with end-of-text tokens around them. They are read from
    the running Python, and are those documents if it is the one that the model card names."""
    tokenizer = tokenizers.Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    stream: list[int] = token_stream(read_corpus().held_out, tokenizer).tolist()
    return stream


def searches(arrivals: list[Arrival], text: list[int], seed: int) -> list[Arrival]:
    """The arrivals with pieces of a text as prompts, both lengths cut so that a sequence is within CONTEXT."""
    generator = np.random.default_rng(seed)
    made = []
    for each in arrivals:
        length = min(len(each.prompt), CONTEXT // 2)
        start = int(generator.integers(0, len(text) - length))
        prompt = [token + SHIFT for token in text[start : start + length]]
        made.append(replace(each, prompt=prompt, output_tokens=min(each.output_tokens, CONTEXT - length)))
    return made


def with_synthetic_beams(arrivals: list[Arrival], certainty: float) -> Result:
    sharing = Sharing()
    simulate(PAGEWIRE, A100_OPT_13B, arrivals, observer=sharing.observe, likelihoods=Likelihoods(certainty))
    return {"percent": sharing.percent, DISTANCE: sharing.pairs_apart}


def with_real_beams(arrivals: list[Arrival], model: PagedModel) -> Result:
    sharing = Sharing()
    workers: list[ModelWorker] = []

    def make_worker(profile: WorkerProfile, epoch: int, likelihoods: Likelihoods | None) -> ModelWorker:
        workers.append(ModelWorker(model, profile, epoch, likelihoods))
        return workers[-1]

    outcome = simulate(PAGEWIRE, A100_OPT_13B, arrivals, observer=sharing.observe, make_worker=make_worker)
    names = {each.request_id for each in sharing.apart}
    means = [np.mean([each.pairs for each in sharing.apart if each.request_id == name]) for name in names]
    likeliest = workers[0].likeliest
    return {
        **sharing.figures(outcome),
        DISTANCE: sharing.pairs_apart,
        "tokens_apart_quartiles_of_searches": [round(float(each), 1) for each in np.quantile(means, (0.25, 0.5, 0.75))],
        "tokens_apart_by_length": by_length([(each.length, each.pairs) for each in sharing.apart]),
        "likeliest_token_mean": round(float(np.mean([probability for _, probability in likeliest])), 3),
        "likeliest_token_by_length": by_length(likeliest),
        "offers": len(likeliest),
    }


def by_length(values: list[tuple[int, float]]) -> dict[str, float]:
    """Means of values by output length, for those lengths that occur."""
    lengths, numbers = np.array(values).T
    spans = [(low, high, (lengths >= low) & (lengths < high)) for low, high in pairwise(LENGTHS)]
    return {f"{low} to {high - 1}": round(float(numbers[at].mean()), 3) for low, high, at in spans if at.any()}


def same(value: float, synthetic: dict[float, Result], key: str) -> float:
    """The certainty at which the synthetic beams have this value, between those that were tried."""
    points = sorted((figures[key], certainty) for certainty, figures in synthetic.items())
    return round(float(np.interp(value, *zip(*points, strict=True))), 2)


def compared(arrivals: list[Arrival], model: PagedModel) -> Result:
    """The real beams of some searches beside the synthetic ones of the same."""
    real = with_real_beams(arrivals, model)
    synthetic = {certainty: with_synthetic_beams(arrivals, certainty) for certainty in CERTAINTIES}
    return {
        "searches": len(arrivals),
        "prompt_tokens_mean": round(float(np.mean([len(each.prompt) for each in arrivals])), 1),
        "output_tokens_mean": round(float(np.mean([each.output_tokens for each in arrivals])), 1),
        "real": real,
        "synthetic_by_certainty": {str(certainty): figures for certainty, figures in synthetic.items()},
        "certainty_of_same_distance": same(real[DISTANCE], synthetic, DISTANCE),
        "certainty_of_same_savings": same(real["percent"], synthetic, "percent"),
    }


def real_beams() -> Result:
    """Beams of the bundled model: blocks saved, how far beams are apart, and the certainty that comes to the same."""
    text, model = held_out_text(), load_model(str(BUNDLED_MODEL))
    ours: Result = {}
    for load, rate, seconds in LOADS:
        ours[load.name] = {}
        for width in WIDTHS:
            arrivals = partial(load.arrivals, rate, n=width, beam_width=width)
            by_seed = [compared(searches(arrivals(SECONDS[load.name], seed=seed), text, seed), model) for seed in SEEDS]
            certainty = round(float(np.mean([each["certainty_of_same_distance"] for each in by_seed])), 2)
            ours[load.name][str(width)] = {
                "by_seed": by_seed,
                "certainty": certainty,
                "figure_15_at_that_certainty": saved_blocks(arrivals(seconds), certainty),
            }
    return {
        "ours": ours,
        "seeds": list(SEEDS),
        "model": "the bundled model: 5,180,672 parameters, float32",
        "text": f"{len(text)} tokens that it was not trained on",
        "profile": A100_OPT_13B.name,
        "kind": "simulated clock and memory; beams are computed by the bundled model on the CPU",
        "note": "prompts and outputs are as long as the load says, prompts up to 512 tokens and both together up to "
        "1024; the end-of-text token is never chosen",
    }
