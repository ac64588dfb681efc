"""`rlae-jax families`."""


def families() -> None:
    """List the models that load: families by the model_type of their config.json, and the formats of their files."""
    import rich.table

    from rlae_jax import report
    from rlae_jax.models import quantised_files
    from rlae_jax.models.families import FAMILIES, REASONS, wrappers
    from rlae_jax.models.gguf_models import ARCHITECTURES

    in_gguf: dict[str, list[str]] = {}
    for name, architecture in ARCHITECTURES.items():
        in_gguf.setdefault(architecture.model_type, []).append(name)
    wrapped: dict[str, list[str]] = {}
    for wrapper, text in wrappers.WRAPPERS.items():
        wrapped.setdefault(wrappers.family_of(text), []).append(wrapper)
    table = rich.table.Table(title=f"{len(FAMILIES)} families")
    table.add_column("model_type", no_wrap=True)
    table.add_column(
        "classes", min_width=max(len(name) for family in FAMILIES.values() for name in family.architectures)
    )
    table.add_column("text part of")
    table.add_column("as GGUF")
    for model_type, family in FAMILIES.items():
        of_type = (", ".join(of.get(model_type, ())) for of in (wrapped, in_gguf))
        table.add_row(model_type, ", ".join(family.architectures), *of_type)
    report.console.print(table)
    for line in (
        "of multimodal models the language model alone is read; images are not",
        f"quantised checkpoints: {', '.join(quantised_files.METHODS)} "
        f"(compressed-tensors as {', '.join(quantised_files.COMPRESSED_FORMS)})",
        "GGUF: all types that the gguf package can dequantise",
        *(
            f"not loaded: {model_type}: {reason}"
            for model_type, reason in REASONS.items()
            if model_type not in FAMILIES
        ),
    ):
        report.console.print(line, highlight=False, soft_wrap=True)
