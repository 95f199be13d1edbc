"""The five published systems as configurations of the one method: what distinguishes them can be read here.

Every function returns a [`SensiConfig`]; further keyword arguments go to it (`calibration=`, `task_type=`, ...). A
recipe whose training has phases sets `schedule`: step it with [`Schedule`], or give [`SensiCallback`] to `Trainer`.
"""

from __future__ import annotations

from typing import Any, Literal

from .tuner.config import SensiConfig
from .utils.errors import SensiError


QUERY_AND_VALUE = ["query", "value", "q_lin", "v_lin", "q_proj", "v_proj"]


def sensi_bert(
    budget: float | int,
    limit: Literal["params", "flops"] = "params",
    score: str | None = None,
    granularity: Literal["unit", "tensor"] = "unit",
    trim: Literal["at wrap", "after warm-up", "in cuts"] = "at wrap",
    **kwargs: Any,
) -> SensiConfig:
    """Sensi-BERT (arXiv 2307.11764): rank, trim to a budget of parameters or FLOPs, fine-tune the rest.

    The procedure of the abstract; scoring and allocation follow the closest published methods (EarlyBERT's learned
    masks, Kwon et al.'s allocation). `granularity="tensor"` keeps or removes whole sublayers. Trimmed is when the
    model is wrapped, after the first tenth of the training, or in four cuts until its middle. During training units
    are scored by Fisher information, because masks would have to be learned beside the weights.
    """
    cuts = {"at wrap": None, "after warm-up": (0.1, 0.1, 1), "in cuts": (0.1, 0.5, 4)}
    if trim not in cuts:
        raise SensiError(f"`trim` must be one of {', '.join(cuts)}, got {trim!r}.")
    if (when := cuts[trim]) is not None:
        kwargs["schedule"] = {"phase": "cut", "start": when[0], "end": when[1], "cuts": when[2]}
    score = score or ("mask" if when is None else "fisher")
    return SensiConfig(budget={limit: budget}, score=score, granularity=granularity, **kwargs)


def far(
    retention: float = 0.1,
    priming: float = 0.01,
    training_steps: int | None = None,
    embeddings: bool = True,
    score: str = "movement",
    **kwargs: Any,
) -> SensiConfig:
    """FAR, Freeze And Reconfigure (arXiv 2205.01541): the FFN neurons that priming moves most learn, others do not.

    Everything outside the FFNs is trained; `embeddings=False` leaves them out, which halves what a small model trains.
    `training_steps` gives the `priming` share its length. `score="random"` is the control.
    """
    if training_steps is not None:
        kwargs["priming_steps"] = max(1, round(priming * training_steps))
    also_train = ["norms", "output_biases", "pooler", *(["embeddings"] if embeddings else [])]
    return SensiConfig(retention=retention, score=score, also_train=also_train, **kwargs)


def learners(rank: int = 64, priming_epochs: float = 2, **kwargs: Any) -> SensiConfig:
    """Learners + priming (arXiv 2208.02070): two projections parallel to every Linear of the blocks, foldable.

    For `priming_epochs` the attention is trained too, and stays what it became; then only the learners, biases and
    norms.
    """
    also_train = ["biases", "norms"]
    if not priming_epochs:
        return SensiConfig(update="low_rank", rank=rank, also_train=also_train, **kwargs)
    # Retention 0 tunes no neuron, which leaves attention as the dense part.
    schedule = {"phase": "freeze_dense", "epochs": priming_epochs}
    return SensiConfig(
        update="dense+low_rank", rank=rank, retention=0.0, also_train=also_train, schedule=schedule, **kwargs
    )


def dsee(
    rank: int = 16,
    sparse: int = 128,
    mask: Literal["unstructured", "structured"] | None = None,
    sparsity: float | None = None,
    support: str = "decomposition",
    draw_at: float = 0.5,
    **kwargs: Any,
) -> SensiConfig:
    """DSEE (arXiv 2111.00160): `(W + U V + S2) * S1` with `U V + S2` on query and value.

    After the share `draw_at` of the training, `mask="unstructured"` removes the share `sparsity` of the weights of
    every Linear of the blocks, and `mask="structured"` heads and neurons with that share of the FLOPs: heads by the
    size of `U V + S2`, neurons by that of their weights.
    """
    if (mask is None) != (sparsity is None):
        raise SensiError("`mask` and `sparsity` belong together: give both or none.")
    kwargs.setdefault("target_modules", QUERY_AND_VALUE)
    if mask == "unstructured":
        kwargs |= {"sparsity": sparsity, "schedule": {"phase": "draw_mask", "at": draw_at}}
    elif mask == "structured":
        kwargs |= {
            "budget": {"flops": 1.0 - float(sparsity or 0.0)},
            "score": kwargs.get("score", "movement"),
            "schedule": {"phase": "cut", "start": draw_at, "end": draw_at, "cuts": 1},
        }
    elif mask is not None:
        raise SensiError(f"`mask` must be 'unstructured', 'structured' or None, got {mask!r}.")
    return SensiConfig(update="low_rank+sparse", rank=rank, sparse=sparse, support=support, **kwargs)


def l0_close(
    share: float | None = None, layers: int | None = None, score: str = "movement", **kwargs: Any
) -> SensiConfig:
    """L0-close fine-tuning (arXiv 2004.14129): only what matters most is tuned, by its movement while priming.

    `share` bounds the parameters of the chosen tensors, as a share of the base's (a quarter by default); `layers`
    chooses whole layers, so many of them. `model.base_model.explain()` tells which were chosen and why.
    """
    if layers is None:
        share = 0.25 if share is None else share
    budget = None if share is None else {"trainable": share}
    return SensiConfig(granularity="tensor", budget=budget, tuned_layers=layers, score=score, **kwargs)


def binary_mask(sparsity: float = 0.1, **kwargs: Any) -> SensiConfig:
    """Fine-tuning by a binary mask over frozen weights (arXiv 2004.14129); only the task head is trained beside it.

    `model.base_model.compress("bits")` turns the trained scores into one bit a weight.
    """
    return SensiConfig(granularity="weight", update="mask", sparsity=sparsity, **kwargs)


RECIPES = {f.__name__: f for f in (sensi_bert, far, learners, dsee, l0_close, binary_mask)}
