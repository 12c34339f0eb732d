"""Run folders with plausible rows in every table, written without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from rayfed_sub.config.loading import load_config, yaml_text
from rayfed_sub.config.schema import Config
from rayfed_sub.core.rng import stream

RANK, STEPS, LABELS = 4, 3, 500
VERSIONS = {"rayfed_sub": "0.1.0", "ray": "2.60.0", "torch": "2.13.0+cpu", "python": "3.11.7"}
ENVIRONMENT = {"processor": "A processor", "threads": 1, "pack_size": 4, "cpu_capability": "AVX2", "gpu": None}
ROWS = {
    **{"read": 1300, "strange": 0, "capped": 100, "silent": 0, "dropped": 3, "repeated": 7, "train": 1080},
    **{"validation": 0, "held_out": 110, "cut": 40, "cut_prompts": 15, "cut_answers": 30},
    **{"shared": 4, "transparent": 2, "deep": 0},
}
FAILURE = "step 2: the loss is nan"


def write_run(
    folder: Path,
    *overrides: str,
    clients: int = 6,
    sampled: int | None = None,
    rounds: int = 5,
    layers: int = 4,
    method: str = "fedit",
    every: int = 1,
    done: int | None = None,
    skipped: tuple[tuple[int, int], ...] = (),
    again: tuple[tuple[int, int], ...] = (),
    resumed: tuple[int, ...] = (),
    diagnostics: bool = True,
    cross: float = 0.05,
    seed: int = 0,
) -> Path:
    """The folder of a run.

    every: rounds between evaluations; done: the number of finished rounds, if not all, of which the last is only in the
    log; skipped: (round, client) pairs that failed; again: (round, pack) pairs that were trained twice; diagnostics:
    whether to write rows of layers; cross: the smallest cross term.  Losses fall from round to round, and rise with a
    client's number."""
    config = load_config(
        {
            "name": folder.name,
            "seed": seed,
            "federation": {"clients": clients, "sampled": sampled, "rounds": rounds, "local_steps": STEPS},
            "method": {"name": method, **({} if method == "fedavg" else {"rank": RANK})},
            "evaluation": {"every": every},
        },
        overrides,
    )
    finished = rounds if done is None else done
    draw = stream(seed, "written run", method)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml_text(config.model_dump(mode="json")))
    taken = _clients(config, finished, set(skipped), draw)
    packs = _packs(config, taken, set(again), resumed, draw)
    evaluated = [n + 1 for n in range(finished) if (n + 1) % every == 0 or n + 1 == rounds]
    scores = _scores(config, [0, *evaluated], draw)
    round_rows = _rounds(config, taken, packs, scores)
    tables = {"rounds": round_rows, "clients": taken, "packs": packs, "scores": scores}
    if diagnostics:
        tables["layers"] = _layers(config, layers, finished, evaluated, cross, draw)
        tables["client_layers"] = _client_layers(config, tables["layers"], taken, draw)
    began = scores[scores["rounds"] == 0].drop(columns="rounds")
    _log(folder, round_rows, began, resumed)
    for name, table in tables.items():
        column = "rounds" if name == "scores" else "round"
        kept = table if done is None else table[table[column] < finished - 1 + (name == "scores")]
        # Without pandas' own types, as the engine writes them.
        plain = pa.Table.from_pandas(kept, preserve_index=False).replace_schema_metadata(None)
        parquet.write_table(plain, folder / f"{name}.parquet")
    if done is None:
        (folder / "summary.json").write_text(json.dumps(_summary(config, round_rows, scores, resumed)))
    return folder


def _clients(config: Config, rounds: int, skipped: set[tuple[int, int]], draw: Any) -> pd.DataFrame:
    total, cohort = config.federation.clients, config.federation.cohort
    chosen = [np.sort(draw.choice(total, cohort, replace=False)) for _ in range(rounds)]
    client = np.concatenate([*chosen, np.zeros(0, int)])
    round = np.repeat(np.arange(rounds), cohort)
    loss = 2.5 * np.exp(-round / max(rounds, 1)) + client / total + draw.uniform(0, 0.2, len(client))
    frame = pd.DataFrame(
        {
            "round": round,
            "client": client,
            "weight": 20.0 + client % 50,
            "uplink_bytes": 40_000,
            "downlink_bytes": np.where(round > 0, 160_000, 0),
            "loss": loss,
            "loss_last": loss - 0.1,
            "labels": float(LABELS),
            "steps": float(STEPS),
            "periods": 1.0,
            "failure": pd.Series([None] * len(client), dtype="object"),
        }
    )
    out = [pair in skipped for pair in zip(round.tolist(), client.tolist(), strict=True)] if skipped else []
    if skipped:
        frame.loc[out, ["weight", "uplink_bytes", "labels", "steps", "periods"]] = 0
        frame.loc[out, ["loss", "loss_last"]] = np.nan
        frame.loc[out, "failure"] = FAILURE
    return frame.astype({"failure": "string"})


def _packs(
    config: Config, taken: pd.DataFrame, again: set[tuple[int, int]], resumed: tuple[int, ...], draw: Any
) -> pd.DataFrame:
    """Packs of a round go to the workers in turn; a round lasts a second more than its packs, and a resumed session
    begins an hour after the previous one."""
    size, workers, rows, clock = config.resources.first_pack, config.resources.workers, [], 1_700_000_000.0
    for round, cohort in taken.groupby("round")["client"]:
        clock += 3600.0 if round in resumed else 0.0
        free = [clock] * workers
        members = cohort.tolist()
        for pack, start in enumerate(range(0, len(members), size)):
            worker, seconds = pack % workers, float(draw.uniform(0.8, 1.2))
            trouble = "worker 1 died" if (round, pack) in again else None
            rows.append(
                {
                    "round": round,
                    "pack": pack,
                    "clients": len(members[start : start + size]),
                    "first": members[start],
                    "worker": worker,
                    "began": free[worker],
                    "seconds": seconds,
                    "tokens": 970,
                    "computed": 1000,
                    "attempts": 2 if trouble else 1,
                    "trouble": trouble,
                }
            )
            free[worker] += seconds
        clock = max(free) + 1.0
    return pd.DataFrame(rows).astype({"trouble": "string"}) if rows else pd.DataFrame()


def _scores(config: Config, evaluated: list[int], draw: Any) -> pd.DataFrame:
    clients, rows = config.federation.clients, []
    for rounds in evaluated:
        loss = 4.0 * 0.8**rounds + 1.0
        own = loss + np.arange(clients) / clients + draw.uniform(0, 0.1, clients)
        for client, value in [(None, loss), *enumerate(own.tolist())]:
            rows.append((rounds, client, "held_out_loss", value, LABELS))
            rows.append((rounds, client, "token_accuracy", float(np.exp(-value / 3)), LABELS))
        rows.append((rounds, None, "rouge_l", 0.3 - 0.25 * 0.8**rounds, 16))
    frame = pd.DataFrame(rows, columns=["rounds", "client", "metric", "value", "count"]).assign(split="test")
    return frame.astype({"client": "Int64"})


def _rounds(config: Config, taken: pd.DataFrame, packs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    overall = scores[scores["client"].isna() & (scores["metric"] == "held_out_loss")].set_index("rounds")["value"]
    rows = []
    for round, cohort in taken.groupby("round"):
        own = packs[packs["round"] == round]
        seconds = float((own["began"] + own["seconds"]).max() - own["began"].min())
        rows.append(
            {
                "round": round,
                "clients": len(cohort),
                "failed": int(cohort["failure"].notna().sum()),
                "loss": float(cohort["loss"].mean()),
                "held_out_loss": overall.get(round + 1),
                "uplink_bytes": int(cohort["uplink_bytes"].sum()),
                "downlink_bytes": int(cohort["downlink_bytes"].sum()),
                "labels": int(cohort["labels"].sum()),
                "change_rank": 16.0 if round + 1 in overall.index else None,
                "epsilon": None,
                "train_seconds": seconds,
                "seconds": seconds + 1.0,
                "retries": int((own["attempts"] - 1).sum()),
                "memory_bytes": 800_000_000 + 1_000_000 * round,
            }
        )
    return pd.DataFrame(rows).astype({"held_out_loss": "float64", "change_rank": "float64", "epsilon": "float64"})


def _layers(config: Config, layers: int, rounds: int, evaluated: list[int], cross: float, draw: Any) -> pd.DataFrame:
    """Each client's rank is the configured one, the aggregate's rank is their sum less one."""
    watched, rows = min(8, config.federation.cohort), []
    for round in range(rounds):
        for layer in range(layers):
            sigma = np.exp(-np.arange(watched * RANK) / (4 + layer)) * 0.8**round
            rows.append(
                {
                    "round": round,
                    "layer": f"model.layers.{layer // 3}.mlp.{('gate', 'up', 'down')[layer % 3]}_proj",
                    "clients": watched,
                    "norm": float(np.linalg.norm(sigma)),
                    "rank": watched * RANK - 1,
                    "rank_sum": watched * RANK,
                    "stable_rank": float((sigma**2).sum() / sigma[0] ** 2),
                    "effective_rank": float(draw.uniform(6, 9)),
                    "truncated": float(0.2 + 0.1 * draw.random() + 0.05 * layer / layers),
                    "cross_term": float(cross + 0.02 * draw.random()),
                    "overlap": float(0.3 + 0.1 * draw.random()),
                    "agreement": float(0.5 - 0.3 * round / max(rounds, 1) - 0.1 * draw.random()),
                    "drift": float(1.0 + round / max(rounds, 1) + 0.2 * draw.random()),
                    "accumulated": 0.01 * (round + 1) if round + 1 in evaluated else None,
                    "server_rank": RANK if round + 1 in evaluated else None,
                    "spectrum": sigma[:64].tolist(),
                    "full_rank": 64,
                }
            )
    return pd.DataFrame(rows).astype({"accumulated": "float64", "server_rank": "Int64"})


def _client_layers(config: Config, layers: pd.DataFrame, taken: pd.DataFrame, draw: Any) -> pd.DataFrame:
    """Rows of the round's first clients; gradients in every other layer."""
    rows = []
    cohorts = {round: cohort["client"].head(8).tolist() for round, cohort in taken.groupby("round")}
    for at, (round, layer) in enumerate(layers[["round", "layer"]].itertuples(index=False, name=None)):
        for client in cohorts[round]:
            rows.append(
                {
                    "round": round,
                    "client": client,
                    "layer": layer,
                    "norm": 0.5,
                    "rank": RANK,
                    "stable_rank": 1.5,
                    "effective_rank": 3.0,
                    "cosine": float(draw.uniform(0.4, 0.8)),
                    "distance": float(draw.uniform(0.8, 1.5)),
                    "turned": float(draw.uniform(0.8, 1.0)) if round else None,
                    "gradient_energy": float(draw.uniform(0.5, 0.9)) if at % 2 else None,
                    "gradient_rank": float(draw.uniform(5, 10)) if at % 2 else None,
                    "spectrum": [1.0, 0.5, 0.25, 0.125],
                }
            )
    names = ["turned", "gradient_energy", "gradient_rank"]
    return pd.DataFrame(rows).astype(dict.fromkeys(names, "float64"))


def _log(folder: Path, rounds: pd.DataFrame, began: pd.DataFrame, resumed: tuple[int, ...]) -> None:
    first = json.loads(began.to_json(orient="records"))
    lines = [{"event": "started", "scores": first, "versions": VERSIONS, "environment": ENVIRONMENT, "rows": ROWS}]
    for row in json.loads(rounds.to_json(orient="records")):
        lines += [{"event": "resumed", "round": row["round"]}] if row["round"] in resumed else []
        lines.append({"event": "round", **row})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + '{"event": "round", "rou')  # as if still being written


def _summary(config: Config, rounds: pd.DataFrame, scores: pd.DataFrame, resumed: tuple[int, ...]) -> dict[str, Any]:
    overall = scores[scores["client"].isna()].groupby("metric")["value"]
    return {
        "name": config.name,
        "method": config.method["name"],
        "rounds": len(rounds),
        "weights_sha256": f"{config.seed:x}".zfill(2) * 32,
        "uplink_bytes": int(rounds["uplink_bytes"].sum()),
        "downlink_bytes": int(rounds["downlink_bytes"].sum()),
        "dense_bytes": 20_000_000,
        "dense_downlink_bytes": 16_000_000,
        "change_rank": 16.0,
        "precision": config.model.dtype,
        "logits": "output layer",
        "wall_seconds": 60.0,
        "train_seconds": 40.0,
        "peak_memory_bytes": 1_000_000_000,
        "metrics": {f"{name}_before": value for name, value in overall.first().items()} | overall.last().to_dict(),
        "versions": VERSIONS,
        "environment": ENVIRONMENT,
        "privacy": None,
        "planned_memory_bytes": 900_000_000,
        "resumed": list(resumed),
        "rows": ROWS,
        "split": "test",
        "stopped": None,
        "best": None,
        "one_at_a_time": False,
        "start_from": None,
        "simulated": None,
        "gpu_memory": {},
        "planned_gpu_bytes": None,
    }
