"""Evaluation: translations, their BLEU, and what trivial systems reach on the same pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .decoding import greedy
from .models import Transformer
from .results import AttentionSample

if TYPE_CHECKING:
    from .data import Pair, Tokenizer

__all__ = ["Bleu", "bleu", "baselines", "translate", "attention_sample"]


@dataclass(frozen=True)
class Bleu:
    """A corpus BLEU, from 0 to 100, with the signature that says how it was computed."""

    score: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Bleu:
    """Corpus BLEU by sacrebleu at its defaults: mixed case, 13a tokenisation, exponential smoothing.

    Parameters
    ----------
    hypotheses, references : sequence of str
        Plain text, as many of the one as of the other.

    Returns
    -------
    Bleu

    Raises
    ------
    ValueError
        If their numbers differ, or there are none.

    References
    ----------
    Papineni et al. 2002; Post 2018.
    """
    from sacrebleu.metrics import BLEU

    if len(hypotheses) != len(references) or not references:
        raise ValueError("BLEU compares as many hypotheses as references, at least one; "
                         f"got {len(hypotheses)} and {len(references)}")
    metric = BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return Bleu(round(score, 4), str(metric.get_signature()))


def baselines(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, float]:
    """BLEU of two systems that know nothing: copying the source, and the most frequent target sentence.

    Parameters
    ----------
    train, test : sequence of Pair
        The most frequent sentence is that of ``train``; of several, the one that comes first.

    Returns
    -------
    dict
        ``copy_source`` and ``most_frequent_sentence``, BLEU on ``test``.
    """
    references = [pair.target for pair in test]
    frequent = Counter(pair.target for pair in train).most_common(1)[0][0]
    return {"copy_source": bleu([pair.source for pair in test], references).score,
            "most_frequent_sentence": bleu([frequent] * len(test), references).score}


def translate(
    model: Transformer,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Translate sentences by greedy decoding, in batches of similar length.

    A translation is cut off at one and a half times its source's tokens, plus 10.

    Parameters
    ----------
    model : Transformer
        An encoder-decoder.
    tokenizer : Tokenizer
        The one it was trained with.
    sentences : sequence of str
        Plain text; an empty one is translated by an empty one.
    batch_tokens : int
        Padded source tokens a batch.
    progress : callable, optional
        Called after each batch with the number of sentences done so far, and of all.

    Returns
    -------
    list of str
        In the order of ``sentences``.
    """
    from .data import pad, token_budget_batches

    sources = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch([s.strip() for s in sentences])]
    todo = [i for i, ids in enumerate(sources) if len(ids) > 1]
    out = [""] * len(sources)
    if not todo:
        return out
    device = next(model.parameters()).device
    lengths = [len(sources[i]) for i in todo]
    done = len(sources) - len(todo)
    for batch in token_budget_batches(lengths, max(batch_tokens, *lengths, 1), shuffle=False):
        rows = [todo[j] for j in batch]
        source = pad([sources[i] for i in rows], tokenizer.pad_id).to(device)
        found = greedy(model, source, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
                       max_length=_longest(source.shape[1]))
        for i, ids in zip(rows, found, strict=True):
            out[i] = tokenizer.decode(ids[:_longest(len(sources[i]))])      # as if it had been alone in the batch
        if progress:
            done += len(rows)
            progress(done, len(sources))
    return out


def _longest(source_tokens: int) -> int:
    return source_tokens * 3 // 2 + 10


@torch.no_grad()
def attention_sample(
    model: Transformer, tokenizer: Tokenizer, source: str, target: str, *, record: str
) -> AttentionSample:
    """Queries and keys of the attention from a target sentence to its source, teacher-forced.

    Parameters
    ----------
    model : Transformer
        An encoder-decoder.
    tokenizer : Tokenizer
        The one it was trained with.
    source, target : str
        A sentence and a translation of it.
    record : str
        Name of the run that trained the model.

    Returns
    -------
    AttentionSample
    """
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        s = torch.tensor([[*tokenizer.encode(source), tokenizer.eos_id]], device=device)
        t = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(target)]], device=device)
        heads = model.record_heads(lambda: model(s, t))
    finally:
        model.train(was_training)
    return AttentionSample(source_tokens=[*tokenizer.tokens(source), "⟨end⟩"],
                           target_tokens=["⟨begin⟩", *tokenizer.tokens(target)],
                           queries=torch.stack([q[0] for q, _, _ in heads]),
                           keys=torch.stack([k[0] for _, k, _ in heads]),
                           source=source, target=target, kernel=model.config.kernel, record=record)
