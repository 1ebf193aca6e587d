"""The commands of the living atlas: their options, and what each does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from atlas.cli.applied import add_device
from atlas.config import MissingGenes
from atlas.errors import ConfigError

if TYPE_CHECKING:
    from atlas.models import TrainedModel

Command = Callable[[str, Callable[[argparse.Namespace], int | None], str], Any]

_APPEND = {
    "label_key": "label_key",
    "unlabeled": "unlabeled",
    "layer": "layer",
    "use_raw": "use_raw",
    "round": "round_counts",
    "feature_type": "feature_type",
    "transpose": "transpose",
    "memory": "memory",
    "orthologs": "orthologs",
}
_SURGERY = (
    "max_epochs",
    "keep_apart",
    "apart_from",
    "missing",
    "force",
    "lr",
    "seed",
    "threads",
    "device",
)


def add_commands(command: Command) -> None:
    """Add the commands to the parser."""
    sub = command("keep", keep, "keep a trained model and its embedding with the store")
    sub.add_argument("store")
    sub.add_argument("folder", metavar="RUN", help="the model's run folder")
    sub.add_argument("--name", default="", help="the model's if not given")
    add_device(sub)

    sub = command(
        "update", update, "add a study to a store and to a model kept with it, all or nothing"
    )
    sub.add_argument("store")
    sub.add_argument("source", help="a file or folder, as for ingest")
    sub.add_argument("--study", required=True, help="name of the study")
    sub.add_argument("--model", required=True, help="name of a model that was kept (atlas keep)")
    sub.add_argument("--batch-key", help="obs column of the batch; a,b combines two")
    sub.add_argument("--label-key", help="obs column of the label, where there is one")
    sub.add_argument("--unlabeled", default="Unknown", help="value that stands for no label")
    sub.add_argument("--layer", help="layer that holds the counts")
    sub.add_argument("--use-raw", action="store_true", help="take the counts from raw.X")
    sub.add_argument("--round", action="store_true", help="round counts that have fractions")
    sub.add_argument("--feature-type", default="Gene Expression", help="of a 10x file or folder")
    sub.add_argument(
        "--transpose", action="store_true", help="of a table in text: a gene on each line"
    )
    add_orthologs(sub)
    sub.add_argument("--memory", default="512MB", help="what counts may take at a time")
    sub.add_argument("--max-epochs", type=int, default=5, help="passes over the study's cells")
    sub.add_argument(
        "--keep-apart",
        type=float,
        help="weight of a penalty on batches that come nearer to each other than their expression "
        "is (default: 1.7, and 20 with --apart-from); 0: none, as in the paper",
    )
    add_apart_from(sub)
    sub.add_argument(
        "--missing",
        choices=get_args(MissingGenes),
        default="mask",
        help="leave genes that the study lacks out, or take them as zero",
    )
    sub.add_argument(
        "--false-unknown",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="call so many cells of known types Unknown at most, as leaving studies out of the "
        "reference tells; 0: Unknown above an uncertainty of .5",
    )
    sub.add_argument("--force", action="store_true", help="with less than half of the genes too")
    sub.add_argument("--lr", type=float, default=0.01, help="of Adam")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--threads", type=int, default=0, help="of a step; 0: as many as torch takes")
    add_device(sub)
    sub.add_argument(
        "--fresh", action="store_true", help="do not go on with an update that was interrupted"
    )

    sub = command("history", history, "list the states of a store and the versions of its models")
    sub.add_argument("store")
    sub.add_argument("--json", action="store_true", help="print JSON, with all that is recorded")

    sub = command(
        "checkout", checkout, "make an earlier state a store of its own, by links: copies nothing"
    )
    sub.add_argument("store")
    sub.add_argument("number", type=int, help="of the state, as in `atlas history`")
    sub.add_argument("--to", required=True, metavar="OUT", help="a path that is free")


def add_apart_from(sub: Any) -> None:
    """Add the option of studies from which new ones are kept apart."""
    sub.add_argument(
        "--apart-from",
        nargs="+",
        default=[],
        metavar="STUDY",
        help="studies known before of which the new one is a condition, as the control of a "
        "stimulation: it is kept apart from these too",
    )


def add_orthologs(sub: Any) -> None:
    """Add the option of a table of orthologs."""
    sub.add_argument(
        "--orthologs",
        metavar="TABLE",
        help="of a study of another species: its genes and the reference's, two columns; pairs "
        "that are one-to-one are used",
    )


def add_unfinished(sub: Any) -> None:
    """Add the option of what an update has left."""
    sub.add_argument(
        "--unfinished",
        action="store_true",
        help="remove what an update by this study has done that was interrupted, and no more: the "
        "store stays as it is",
    )


def keep(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    store = open_store(options.store)
    name = options.name or workflows.named(options.folder)
    version = workflows.keep(store, options.folder, name, device=options.device, progress=True)
    print(f"model {name} {version} and its embedding kept; manifest {store.number}")


def update(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    values = vars(options)
    keys = options.batch_key.split(",") if options.batch_key else None
    made = workflows.update(
        options.store,
        options.source,
        study=options.study,
        model=options.model,
        ingest={"batch_key": keys, **{to: values[name] for name, to in _APPEND.items()}},
        fresh=options.fresh,
        false_unknown=options.false_unknown if options.false_unknown > 0 else None,
        progress=True,
        **{name: values[name] for name in _SURGERY},
    )
    for note in made.notes:
        print(note)
    trained = workflows.stored_model(open_store(options.store), made.model, made.version)
    print("\n".join(told_of_surgery(trained)))
    if made.labels:
        print(f"labels by neighbours ({options.model}_label):")
    else:
        print("no cell had a label that could be transferred")
    _print_cells(made.labels)
    if made.classes:
        print(f"labels by the model's classifier ({options.model}_class):")
        _print_cells(made.classes)
    for group in made.drift.unseen:
        print(
            f"Unknown cells that lie together ({options.model}_label_group): {group.name}, "
            f"{group.n_obs:,} cells, high in {', '.join(group.markers)}"
        )
    print(_drift(made.drift.to_json()))
    for said in made.drift.advice:
        print(f"advice: {said}")
    print(
        f"{made.study}: {made.n_obs:,} cells added, model {made.model} {made.version}, manifest "
        f"{made.manifest}, in {made.seconds:.1f} s"
    )


def told_of_surgery(model: TrainedModel) -> list[str]:
    """Lines on what was added to a model last: how much was trained for it, and new classes."""
    added = model.surgery[-1]
    total = sum(part.numel() for part in model.module.parameters())
    lines = [
        f"{model.name} + {', '.join(added.studies)}: {added.n_trained:,} of {total:,} parameters "
        f"trained ({added.strategy}, {added.initialisation})"
    ]
    if added.orthologs:
        lines.append(
            f"{len(added.orthologs):,} of {len(model.genes):,} genes are orthologs' counts"
        )
    if added.labels:
        lines.append(f"new classes: {', '.join(added.labels)}")
        if model.labels is not None and model.labels.n_levels > 1:
            lines.append(
                "they stand at the root, in none of the groups of the hierarchy: that is the "
                "reference's, and surgery takes no other"
            )
    return lines


def _print_cells(counts: dict[str, int]) -> None:
    for name, n in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {name:<40} {n:>12,} cells")


def _drift(drift: dict[str, Any]) -> str:
    unknown = drift["unknown_share"]
    return (
        ("" if unknown is None else f"{unknown:.1%} Unknown, ")
        + f"mixing {drift['entropy']:.3f} of {drift['entropy_ceiling']:.3f} nats, bound "
        f"{drift['bound_before']:.2f} before and {drift['bound_after']:.2f} after surgery"
    )


def history(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    store = open_store(options.store)
    states, models = workflows.history(store)
    unfinished = [one.to_json() for one in workflows.unfinished_updates(store)]
    if options.json:
        every = {"states": states, "models": models, "unfinished": unfinished}
        print(json.dumps(every, indent=1))
        return
    for state in states:
        told = f"{state['n_obs']:,} cells of {len(state['studies'])} studies"
        print(f"{state['number']:>4} {state['created']}  {state['action']:<44} {told}")
    for model in models:
        parent = f"from {model['name']} {model['parent']}" if model["parent"] else "trained"
        print(f"{model['name']} {model['version']}: {parent}, knows {', '.join(model['studies'])}")
        if "drift" in model:
            print(f"  {model['study']}: {_drift(model['drift'])}")
            for said in model["drift"]["advice"]:
                print(f"  advice: {said}")
    print_unfinished(unfinished)


def print_unfinished(updates: list[dict[str, Any]]) -> None:
    """Print updates that are not at their end, and what to do with each."""
    for one in updates:
        told = f", model {one['model']}" if one["model"] else ""
        print(
            f"\nunfinished update by {one['study']}{told}: begun {one['begun']}, "
            f"{one['n_bytes'] / 1e6:,.1f} MB"
        )
        for line in one["do"]:
            print(f"  {line}")


def discard(options: argparse.Namespace) -> None:
    from atlas import workflows

    if options.purge:
        raise ConfigError(
            "An unfinished update is in no state of the store",
            found="--purge with --unfinished",
            do="leave one of them out",
        )
    gone = workflows.discard_update(options.store, options.study)
    print(
        f"{gone.study}: what an update begun {gone.begun} had done is removed, "
        f"{gone.n_bytes / 1e6:,.1f} MB; the store is as it was"
    )


def checkout(options: argparse.Namespace) -> None:
    from atlas import workflows

    made = workflows.checkout(options.store, options.number, options.to)
    print(f"{made!r}: state {made.number}, to be read as any store")
    print(f"from Python: atlas.open_store({options.store!r}, number={made.number})")
