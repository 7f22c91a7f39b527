"""`posttrain show NAME`: a recipe with every default filled in, a stage's settings, an option, a builder or reward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

    from posttrain.config.catalogue import Entry
    from posttrain.config.recipe import ResolvedRecipe


def command(
    name: Annotated[str, typer.Argument(help="A recipe, stage type, or option of a group (`posttrain list`).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value …]", help="For a recipe: settings, in Hydra's grammar.")
    ] = None,
    origin: Annotated[bool, typer.Option("--origin", help="For a recipe: where each value was written.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Settings, types and defaults as JSON.")] = False,
    config_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Your own recipes and groups, looked at first.")
    ] = None,
) -> None:
    """Show a recipe as it would run, or the settings of a stage, or what is behind a model or data option."""
    import os

    from posttrain.config import catalogue
    from posttrain.config.suggest import nearest
    from posttrain.errors import RecipeError

    entries = catalogue.everything(config_dir)
    found = [entry for entry in entries if entry.name == name]
    is_path = os.sep in name or name.endswith((".yaml", ".yml"))
    if is_path or any(entry.kind == "recipe" for entry in found):
        # A recipe may bear the name of the stage that it is about.
        stages = [entry for entry in found if entry.kind == "stage"]
        if schema:
            typer.echo(stage_schema(stages[0]) if stages else recipe_schema())
            return
        text = recipe_text(name, overrides or [], origin, config_dir)
        typer.echo("\n\n".join([*([] if overrides or origin else map(entry_text, stages)), text]))
        return
    if not found:
        guess = nearest(name, [entry.name for entry in entries])
        fix = f"write posttrain show {guess}" if guess else "`posttrain list` lists what there is"
        raise RecipeError(f"there is no recipe, stage type or option `{name}`", fix=fix)
    if overrides:
        what = f"`{name}` is a {found[0].kind}, which takes no settings here"
        raise RecipeError(what, " ".join(overrides), "leave them out")
    if schema:
        typer.echo(stage_schema(found[0]))
    else:
        typer.echo("\n\n".join(entry_text(entry) for entry in found))


def recipe_text(name: str, overrides: list[str], origin: bool, config_dir: Path | None) -> str:
    """A recipe with all defaults filled in, as YAML; with `origin` each value's place as a comment."""
    from posttrain.config.recipe import dump_yaml, load_recipe

    recipe = load_recipe(name, overrides, config_dir=config_dir)
    if not origin:
        return dump_yaml(recipe.document()).rstrip() + deepspeed_text(recipe)
    origins = recipe.origins
    rows = list(_lines(recipe.document(), (), origins))
    width = min(56, max(len(text) for text, _ in rows))
    return "\n".join(f"{text:{width}}  # {place}" if place else text for text, place in rows)


def deepspeed_text(recipe: ResolvedRecipe) -> str:
    """What DeepSpeed is given in each training stage, as comments below the recipe; nothing with other engines."""
    import json

    from posttrain.config import registry
    from posttrain.config.deepspeed import deepspeed_config

    engine = recipe.frame.engine
    if not engine.strategy.startswith("zero"):
        return ""
    lines = []
    for name, cfg in recipe.stages.items():
        if not registry.stage(cfg.type).parallel:
            continue
        try:
            micro_batch = cfg.micro_batch(engine.world_size)
        except ValueError as error:
            lines += ["", f"# DeepSpeed in stage {name}: {error}"]
            continue
        accumulation = cfg.sequences_per_step // (micro_batch * engine.world_size)
        settings = {"micro_batch": micro_batch, "accumulation": accumulation, "max_grad_norm": cfg.max_grad_norm}
        config = deepspeed_config(int(engine.strategy[-1]), engine.world_size, overrides=engine.deepspeed, **settings)
        text = json.dumps(config, indent=2).splitlines()
        lines += ["", f"# DeepSpeed's configuration in stage {name}:", *(f"#   {line}" for line in text)]
    return "\n".join(["", *lines]) if lines else ""


def _lines(value: dict[str, Any], path: tuple[str, ...], origins: Any) -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        here = (*path, str(key))
        indent = "  " * len(path)
        if isinstance(item, dict) and item:
            yield f"{indent}{key}:", ""
            yield from _lines(item, here, origins)
        else:
            yield f"{indent}{key}: {_flow(item)}", origins.get(".".join(here), "default")


def _flow(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()


def entry_text(entry: Entry) -> str:
    """Whatever is named, as text."""
    if entry.kind == "stage":
        return stage_text(entry)
    return option_text(entry) if entry.path is not None else plugin_text(entry)


def plugin_text(entry: Entry) -> str:
    """A data builder or reward of an installed package: what it does, and its settings."""
    from inspect import getdoc

    from posttrain.config import plugins

    group = next(group for group, kind in plugins.KINDS.items() if kind == entry.kind)
    plugin = plugins.lookup(group, entry.name)
    assert plugin is not None
    found = plugins.load(plugin)
    lines = [f"{entry.name} ({entry.kind} of {plugin.origin}): {getdoc(found) or plugin.target}"]
    if group == plugins.DATA:
        lines += ["", "settings:", *_fields(found.Config, "", ())]
    return "\n".join(lines)


def stage_text(entry: Entry) -> str:
    """A stage type: what it does, its inputs, outputs and settings."""
    from inspect import getdoc

    from posttrain.config import registry

    stage = registry.stage(entry.name)
    lines = [f"{entry.name} (stage type): {getdoc(stage.Config) or getdoc(stage) or entry.line}", ""]
    if stage.inputs:
        lines.append("inputs:")
        width = max(map(len, stage.inputs))
        for name, spec in stage.inputs.items():
            optional = ", optional" if spec.optional else ""
            lines.append(f"  {name:{width}}  a {spec.type}{optional}{f': {spec.doc}' if spec.doc else ''}")
    lines.append("outputs:")
    lines += [f"  {name}  a {type_}" for name, type_ in stage.outputs.items()]
    lines += ["settings:", *_fields(stage.Config, "", ("type", "inputs"))]
    return "\n".join(lines)


def _fields(model: type[BaseModel], prefix: str, skip: tuple[str, ...]) -> Iterator[str]:
    from textwrap import wrap

    from posttrain.config.explain import field_words, section_model, show_value

    for name, info in model.model_fields.items():
        if name in skip:
            continue
        value = None if info.is_required() else info.get_default(call_default_factory=True)
        default = "must be given" if info.is_required() else f"default {show_value(value)}"
        extra = info.json_schema_extra
        outside = ", does not enter the key" if isinstance(extra, dict) and extra.get("key") is False else ""
        inner = section_model(info.annotation)
        yield f"  {prefix}{name}: {field_words(info)}; {default if inner is None else 'below'}{outside}"
        yield from wrap(info.description or "", 100, initial_indent="      ", subsequent_indent="      ")
        if inner is not None:
            yield from _fields(inner, f"{prefix}{name}.", ())


def option_text(entry: Entry) -> str:
    """An option of a group: its file, with the comments."""
    assert entry.path is not None
    return f"{entry.name} ({entry.kind}), {entry.path}\n\n{entry.path.read_text(encoding='utf-8').rstrip()}"


def stage_schema(entry: Entry) -> str:
    """Inputs, outputs and the JSON schema of the settings of a stage, or of the stage behind a model or data option."""
    import json
    from dataclasses import asdict

    from posttrain.config import registry
    from posttrain.config.schema import SOURCE_SECTIONS, Frame
    from posttrain.errors import RecipeError
    from posttrain.pipeline.stage import Stage

    if entry.kind not in ("stage", *SOURCE_SECTIONS, *Frame.model_fields):
        raise RecipeError(f"{entry.kind} `{entry.name}` has no schema of its own", "--schema", "leave it out")
    if entry.kind not in ("stage", *SOURCE_SECTIONS):
        section = Frame.model_fields[entry.kind].annotation
        return json.dumps(section.model_json_schema(), indent=1, ensure_ascii=False)  # type: ignore[union-attr]
    stage: Stage = registry.stage(SOURCE_SECTIONS.get(entry.kind, entry.name))
    shown = {
        "type": stage.type,
        "version": stage.version,
        "inputs": {name: asdict(spec) for name, spec in stage.inputs.items()},
        "outputs": stage.outputs,
        "config": stage.Config.model_json_schema(),
    }
    return json.dumps(shown, indent=1, ensure_ascii=False)


def recipe_schema() -> str:
    """The JSON schema of a recipe's frame; `show STAGE --schema` has the stages'."""
    import json

    from posttrain.config.schema import Frame

    return json.dumps(Frame.model_json_schema(), indent=1, ensure_ascii=False)
