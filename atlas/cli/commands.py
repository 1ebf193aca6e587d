"""What each command does: call a workflow, print what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from atlas.cli import living
from atlas.config import ARCHITECTURES, TrainConfig
from atlas.errors import OutputError

# torch, zarr and the rest are imported by the command that needs them, so that --help is quick


def ingest(options: argparse.Namespace) -> None:
    from atlas import workflows

    report = workflows.ingest(
        options.store,
        options.source,
        study=options.study,
        batch_key=options.batch_key.split(",") if options.batch_key else None,
        label_key=options.label_key,
        unlabeled=options.unlabeled,
        profile=options.profile,
        layer=options.layer,
        use_raw=options.use_raw,
        round_counts=options.round,
        feature_type=options.feature_type,
        transpose=options.transpose,
        gene_lengths=options.gene_lengths,
        orthologs=options.orthologs,
        measurement=options.measurement,
        obs_filter=options.obs_filter,
        keep_layers=options.keep_layers.split(",") if options.keep_layers else (),
        prefix_rows=options.prefix_rows,
        genes_of_all=options.genes_of_all,
        memory=options.memory,
        scheduler=options.scheduler,
        fresh=options.fresh,
        genes=Path(options.genes).read_text().split() if options.genes else None,
        first=options.first,
        format=options.format,
        progress=True,
    )
    speed = report.n_obs / max(report.seconds, 1e-9)
    print(
        f"{report.study}: {report.n_obs:,} cells, {report.nnz:,} counts, {report.new_genes:,} new "
        f"genes, in {report.seconds:.1f} s ({speed:,.0f} cells/s)"
    )
    for note in report.notes:
        print(note)
    if report.missing_genes:
        print(f"{report.missing_genes:,} genes of the store were not measured in this study")
    for name, n in report.same_counts.items():
        print(f"{n:,} cells of study {name} have the very same counts as cells of {report.study}")
    for name, n in report.same_names.items():
        print(f"{n:,} cells of study {name} have the same row names as cells of {report.study}")


def info(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    info = workflows.info(open_store(options.store))
    if options.json:
        print(json.dumps(dataclasses.asdict(info), indent=1))
        return
    print(f"{info.path}: {info.n_obs:,} cells × {info.n_vars:,} genes, {info.nnz:,} counts")
    print(f"{info.bytes_on_disk / 1e6:,.1f} MB on disk, manifest {info.manifest}")
    for title, rows in (("studies", info.studies), ("batches", info.batches)):
        print(f"\n{title}")
        for row in rows:
            print(f"  {row['name']:<40} {row['cells']:>12,} cells")
    print(f"\nlabels ({info.unlabeled:,} cells without one)")
    for row in info.labels:
        print(f"  {row['name']:<40} {row['cells']:>12,} cells")
    print(f"\ngenes chosen: {info.genes_chosen or 'none yet (atlas genes)'}")
    names = [f"{e['name']} ({e['n_latent']} dimensions)" for e in info.embeddings]
    print(f"embeddings: {', '.join(names) or 'none yet (atlas embed)'}")
    models = [f"{m['name']} {m['version']}" for m in info.models]
    print(f"models: {', '.join(models) or 'none yet (atlas keep)'}")
    print("\nhistory")
    for line in info.history:
        print(f"  {line}")
    living.print_unfinished(info.unfinished)


def verify(options: argparse.Namespace) -> int:
    from atlas import workflows

    report = workflows.verify(options.store, progress=True, threads=options.threads)
    for finding in report.findings:
        print(f"{finding.path}: {finding.what}")
        if finding.study is not None:
            print(f"  study: {finding.study}")
        for name, value in (("found", finding.found), ("expected", finding.expected)):
            if value is not None:
                print(f"  {name}: {value}")
        print(f"  what to do: {finding.do}")
    if report.unlisted:
        print(f"… and {report.unlisted:,} more")
    checked = (
        f"{report.states} states, {report.studies} studies, {report.chunks:,} chunks, "
        f"{report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s"
    )
    faults = len(report.findings) + report.unlisted
    print(f"{report.path}: {'whole' if report.whole else f'{faults:,} faults'} ({checked})")
    if options.json:
        workflows.write_json(options.json, report.to_json())
    return 0 if report.whole else 1


def annotate(options: argparse.Namespace) -> None:
    from atlas import open_store

    report = open_store(options.store).annotate(
        options.table,
        study=options.study,
        batch_key=options.batch_key,
        label_key=options.label_key,
        unlabeled=options.unlabeled,
    )
    for name, n in report.cells.items():
        print(f"{name}: {n:,} cells annotated")
    print(f"columns {', '.join(report.columns)}; manifest {report.manifest}")


def drop(options: argparse.Namespace) -> None:
    from atlas import open_store

    if options.unfinished:
        living.discard(options)
        return
    report = open_store(options.store).drop(options.study, purge=options.purge)
    print(f"{report.study}: {report.n_obs:,} cells dropped, manifest {report.manifest}")
    if report.removed_states:
        gone = ", ".join(map(str, report.removed_states))
        print(f"removed for ever: states {gone}, {report.freed_bytes / 1e6:,.1f} MB")
    if report.kept_states:
        kept = ", ".join(map(str, report.kept_states))
        print(
            f"older states hold it still ({kept}), so {report.kept_bytes / 1e6:,.1f} MB of its "
            "files stay; --purge removes both"
        )
    if report.removed_models:
        print(f"versions of models gone with these states: {', '.join(report.removed_models)}")
    if report.models:
        print(f"models that know it, and stay as they are: {', '.join(report.models)}")
    if report.embeddings:
        print(f"embeddings, now without its cells: {', '.join(report.embeddings)}")
    if report.genes_without_study:
        print(
            f"{report.genes_without_study:,} of the chosen genes were measured in no study that is "
            "left: choose again with `atlas genes`"
        )


def genes(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    store = open_store(options.store)
    genes = workflows.select_genes(store, options.n, flavour=options.flavour)
    print("\n".join(genes) if options.list else f"{len(genes):,} genes chosen and recorded")


def project(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    genes = None if options.genes == "chosen" else Path(options.genes).read_text().split()
    made = workflows.project(
        open_store(options.store), genes, options.out, progress=True, threads=options.threads
    )
    print(f"{options.out}: {made.n_obs:,} cells × {made.n_vars:,} genes, {made.nnz:,} counts")


def train(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows
    from atlas.training.ranks import first_rank

    values = vars(options)
    kinds = (*ARCHITECTURES.values(), TrainConfig)
    names = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    model = workflows.train(
        open_store(options.store),
        options.model,
        out=options.out,
        hold_out=options.hold_out,
        label_key=options.label_key,
        unlabeled=options.unlabeled,
        hierarchy=options.hierarchy,
        categorical_covariates=_listed(options.categorical_covariates),
        continuous_covariates=_listed(options.continuous_covariates),
        size_factor=options.size_factor,
        start_from=options.start_from,
        resume=options.resume,
        progress=True,
        **{name: values[name] for name in names & set(values)},
    )
    if not first_rank():
        return
    history = model.training["history"]
    bound = history[-1]["validation_bound"]
    print(
        f"trained {len(history)} epochs"
        + (f", held-out bound {bound:.2f} nats per cell" if bound is not None else "")
    )
    print(f"{options.out}: model.json, weights.safetensors, log.jsonl")


def extend(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    values = vars(options)
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    model = workflows.extend_reference(
        options.model,
        open_store(options.store),
        options.study,
        out=options.out,
        strategy=options.strategy,
        initialisation=options.initialisation,
        label_key=options.label_key,
        orthologs=options.orthologs,
        missing=options.missing,
        keep_apart=options.keep_apart,
        apart_from=options.apart_from,
        force=options.force,
        resume=options.resume,
        progress=True,
        **{name: values[name] for name in names & set(values)},
    )
    print("\n".join(living.told_of_surgery(model)))
    print(f"{options.out}: model.json, weights.safetensors, log.jsonl")


def _listed(text: str | None) -> list[str]:
    return text.split(",") if text else []


def embed(options: argparse.Namespace) -> None:
    from atlas import load_model, open_store, workflows
    from atlas.training.ranks import first_rank

    store = open_store(options.store)
    model = load_model(options.model)
    given: dict[str, Any] = {"name": options.name, "device": options.device, "progress": True}
    if options.per_batch is None:
        z = workflows.embed(model, store, projection=options.projection, **given)
        name = options.name or model.name
    else:
        given |= {"max_epochs": options.max_epochs, "resume": options.resume}
        z = workflows.embed_per_batch(model, store, out=options.per_batch, **given)
        name = options.name or f"{model.name}_batch"
    if first_rank():
        print(f"embedding {name}: {z.shape[0]:,} cells × {z.shape[1]} dimensions")


def seed_labels(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    found = workflows.seed_labels(
        open_store(options.store),
        options.signatures,
        name=options.name,
        top=options.top,
        rows=options.rows,
        aliases=options.aliases,
        ignore_missing=options.ignore_missing,
        as_label=options.as_label,
        unlabeled=options.unlabeled,
        progress=True,
    )
    for gene in found.genes:
        name = gene.name if gene.name in (None, gene.asked) else f"{gene.name} ({gene.asked})"
        told = f"counts in {gene.detected:.1%} of the cells" if gene.name else "left out"
        print(f"{name or gene.asked:<24} {told}")
    for signature, n in zip(found.signatures, found.n_seeds, strict=True):
        print(f"{signature.name:<24} {n:,} seeds")
    if found.n_shared:
        print(f"{found.n_shared:,} cells were among the top of several signatures")
    print(f"{found.n_scored:,} cells scored; columns {', '.join(found.columns)}")
    if options.as_label:
        print(f"{options.name} is the label now")


def export(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    adata = workflows.export(
        open_store(options.store),
        options.out,
        embedding=options.embedding,
        rows=options.rows,
        order=options.order,
    )
    print(f"{options.out}: {adata.n_obs:,} cells × {adata.n_vars:,} genes")


def import_scvi(options: argparse.Namespace) -> None:
    import atlas

    if Path(options.out).exists() and any(Path(options.out).iterdir()):
        raise OutputError("The folder is not empty", do="choose another as --out", path=options.out)
    model = atlas.import_scvi(options.folder)
    if options.study is not None:
        names = {name: f"{options.study}/{name}" for name in model.batches}
        model = atlas.import_scvi(options.folder, batches=names)
    model.save(options.out)
    print(f"{options.out}: scVI of {len(model.genes):,} genes and {len(model.batches)} batches")


def export_scvi(options: argparse.Namespace) -> None:
    import atlas

    atlas.export_scvi(atlas.load_model(options.model), options.out, batch_key=options.batch_key)
    print(f"{options.out}: for scvi.model.SCVI.load(folder, adata=adata)")


def convert(options: argparse.Namespace) -> None:
    from atlas import convert_store, open_store, workflows

    store = open_store(options.store)
    if options.out.endswith(".h5ad"):
        adata = workflows.export(store, options.out)
        print(f"{options.out}: {adata.n_obs:,} cells × {adata.n_vars:,} genes")
        return
    converted = convert_store(
        store,
        options.out,
        profile=options.profile,
        format=options.format,
        threads=options.threads,
        progress=True,
    )
    print(f"{options.out}: {converted.n_obs:,} cells × {converted.n_vars:,} genes")


def inventory(options: argparse.Namespace) -> None:
    from atlas.store import write_inventory

    print(write_inventory(options.store))


def simulate(options: argparse.Namespace) -> None:
    from atlas.simulate import simulate

    paths = simulate(
        Path(options.out_dir),
        options.cells,
        options.studies,
        options.seed,
        genes=options.genes,
        types=options.types,
        batches=options.batches,
        library=options.library,
        missing_genes=options.missing_genes,
        varying_genes=options.varying_genes,
        process=options.process,
        tree=options.tree,
        new_type=options.new_type,
    )
    print("\n".join(map(str, paths)))
