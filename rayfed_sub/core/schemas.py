"""Row schemas of the tables in a run folder: rounds, packs, clients, scores, layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundRow:
    """A round.  clients: sampled, those skipped among them; failed: skipped.  Bytes are wire bytes of the whole
    cohort; losses in nats per label, loss: the mean over clients that were not skipped; labels: tokens, or classified
    rows, that carried loss; change_rank: median over the diagnosed target layers of the rank of the server's change
    (None: not diagnosed); epsilon: privacy spent up to here (None where no evaluation was due); retries: repeated
    packs, whose results were lost or unsound; memory_bytes: of coordinator and workers at the round's end; seconds
    include evaluation.
    """

    round: int
    clients: int
    failed: int
    loss: float | None
    held_out_loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    labels: int
    change_rank: float | None
    epsilon: float | None
    train_seconds: float
    seconds: float
    retries: int = 0
    memory_bytes: int | None = None


@dataclass(frozen=True)
class PackRow:
    """Training of a pack.  pack: its number in the round; clients: their number; first: the first client; began: Unix
    time of the start; seconds: that the worker took; tokens: of its rows, over all local steps (of images, their
    number); computed: those that linear layers saw, with what only fills up; trouble: causes of earlier failures.
    This table depends on workers and failures."""

    round: int
    pack: int
    clients: int
    first: int
    worker: int
    began: float
    seconds: float
    tokens: int | None = None
    computed: int | None = None
    attempts: int = 1
    trouble: str | None = None


@dataclass(frozen=True)
class ClientRow:
    """A client's round.  loss: mean over its local steps; loss_last: at its last step, before that step.  A client
    that was skipped has weight 0, sent nothing, and has the cause in failure."""

    round: int
    client: int
    weight: float
    uplink_bytes: int
    downlink_bytes: int
    loss: float | None = None
    loss_last: float | None = None
    labels: float = 0.0
    steps: float = 0.0
    periods: float = 0.0
    failure: str | None = None


@dataclass(frozen=True)
class TimelineRow:
    """A client's round in simulated seconds since the run's begin, in runs with devices.  round: in which its update
    counted, or in which it was dropped; of clients under way when an asynchronous run ends the number of its rounds;
    version: finished rounds of the server that it began from, so that its staleness is the difference; device: its
    class.  began: start of its download; download_seconds, compute_seconds, upload_seconds: what these take; ended:
    arrival of its update, or the moment at which it was given up; round_ended: end of the round; idle_seconds: from its
    end to that of a synchronous round, while its hours last: 0 for who has left.  outcome: `counted`, `late` (after
    the deadline, or not among the first), `stale` (beyond max_staleness), `offline` (its hours ended, or it broke off),
    `failed` or `unfinished` (when the run ended).  Bytes: that had crossed by then.  steps, tokens: local steps and the
    tokens of their rows on average (of images, their number); joules: of its training, None where the power is not
    known."""

    round: int
    client: int
    device: str
    version: int
    began: float
    download_seconds: float
    compute_seconds: float
    upload_seconds: float
    ended: float
    round_ended: float
    idle_seconds: float
    outcome: str
    downlink_bytes: int
    uplink_bytes: int
    steps: float
    tokens: float
    joules: float | None = None


@dataclass(frozen=True)
class ScoreRow:
    """A `Score` of the model after so many finished rounds."""

    rounds: int
    client: int | None
    metric: str
    value: float
    count: int
    split: str | None = None


@dataclass(frozen=True)
class AnswerRow:
    """The greedy answer to a held-out question by the model after so many finished rounds, none and all of them.

    row: number of the held-out row; client: whose data it resembles, and, where clients have models of their own, who
    answers; question: what the model reads, without special tokens, of a chat all before its last answer; reference:
    what it should say, cut to task.max_length; answer: at most evaluation.max_new_tokens tokens."""

    rounds: int
    row: int
    client: int
    question: str
    reference: str
    answer: str


@dataclass(frozen=True)
class ClientLayer:
    """A layer in a client's round.

    norm: ||D_k||_F.  rank, stable_rank, effective_rank, spectrum: of D_k (see `lowrank.Spectrum`), at most 16 values.
    cosine: <D_k, D> / (|D_k| |D|).  distance: ||D_k - D||_F / ||D||_F.  turned, gradient_energy, gradient_rank: see
    `ClientChange`.  Of dense changes, rank and spectrum are left out, cosine and distance are those of sampled rows.
    """

    round: int
    client: int
    layer: str
    norm: float
    rank: int | None
    stable_rank: float | None
    effective_rank: float | None
    cosine: float | None
    distance: float | None
    turned: float | None
    gradient_energy: float | None
    gradient_rank: float | None
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class CohortLayer:
    """A layer in a round, over all watched clients.

    clients: watched.  norm, rank, stable_rank, effective_rank, spectrum: of D, at most 64 values.
    rank_sum: the sum of the clients' ranks; the rank of D is at most that (Prop. 1 of arXiv 2410.23111) and full_rank,
        which is min(m, n).
    truncated: share of ||P||_F lost by cutting P to rank r, sqrt(sum_{i>r} sigma_i^2) / ||P||_F, 0 to 1, r the most
        columns of a client's term (FlexLoRA's bottleneck).
    cross_term: ||P - s B'A'||_F / ||P||_F, what averaging B and A apart misses: B' = sum p_k B_k, A' = sum p_k A_k,
        ranks padded with zeros, P - s B'A' = s sum p_k (B_k - B')(A_k - A').  Of LoRA without a core only.
    overlap: mean over pairs of ||V_j V_k^T||_F^2 / min(r_j, r_k), V_k (r_k, .) the r_k strongest singular directions of
        D_k on the side that GaLore projects (n for m >= n, else m), r_k = min(rank of D_k, columns of its term); 1: the
        same subspace, about r / min(m, n): random ones.
    agreement: mean over pairs of <D_j, D_k> / (|D_j| |D_k|).
    drift: sqrt(sum p_k ||D_k - D||_F^2) / ||D||_F; 0: all alike, sqrt(N - 1): orthogonal, of equal weight and norm.
    accumulated: ||W - W_0||_F / ||W_0||_F, W_0 the pretrained weight; server_rank: rank of the server's own change of
        the round (`diagnostics/server_change.py`).
    Of dense changes ranks, spectrum, truncated, cross_term and overlap are left out; norm, agreement and drift are
    those of sampled rows.
    """

    round: int
    layer: str
    clients: int
    norm: float
    rank: int | None
    rank_sum: int | None
    stable_rank: float | None
    effective_rank: float | None
    truncated: float | None
    cross_term: float | None
    overlap: float | None
    agreement: float | None
    drift: float | None
    accumulated: float | None
    server_rank: int | None
    spectrum: tuple[float, ...]
    full_rank: int = 0


@dataclass(frozen=True)
class Score:
    """client: over the rows dealt to it, None: over all.  count: rows; of the loss and the accuracy of tokens, labels.

    metric: `held_out_loss`, nats per label.  Language modelling: `perplexity`, `token_accuracy`; of texts `rouge_l` and
    `bleu_4` as published, `rouge_l_unicode` and `bleu_4_unicode` over the words of any script (greedy answers against
    references cut to task.max_length), and the same names after `teacher_forced_` (the likeliest token at every label,
    given the true ones before it, against the labels).  Published scores are missing where they cannot read the
    references (`evaluation/generation.py`).
    Classification: `accuracy`, `macro_f1`, `f1/<class>` of classes that a row has or is given, and over all rows
    `confusion/<true>/<predicted>` where not 0.  A metric of `evaluation.metrics`: `<metric>/<its score>`.

    split: the name of the split that the rows are of (`Dataset.split`); None in runs of older versions.
    """

    client: int | None
    metric: str
    value: float
    count: int
    split: str | None = None
