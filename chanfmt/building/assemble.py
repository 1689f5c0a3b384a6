"""From what a pass measured to the content of an atlas: labels, records, stacks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra import labels
from chanfmt.algebra.columns import with_columns
from chanfmt.algebra.inputs import inputs_group
from chanfmt.base.narrate import say
from chanfmt.building.columns import ffn_columns, untraced
from chanfmt.building.derive import layer_variables, stack_layers
from chanfmt.building.inputs import ffn_inputs
from chanfmt.building.session import producer_record
from chanfmt.building.state import extensions, partial_variables
from chanfmt.data.sources import contributions
from chanfmt.data.tokens import CalibrationTokens
from chanfmt.format import schema
from chanfmt.format.columns import OWNER
from chanfmt.format.records import AtlasContent, Block, CalibrationRecord
from chanfmt.models.find.discover import block_of
from chanfmt.models.matrices import ffn_weights
from chanfmt.models.stored.layout import stored_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chanfmt.algebra.inputs import Input
    from chanfmt.building.columns import ColumnPlan
    from chanfmt.building.measure import Measurement
    from chanfmt.building.plan import BuildPlan
    from chanfmt.building.session import Session
    from chanfmt.format.records import StackData


def assemble(plan: BuildPlan, measurement: Measurement, session: Session) -> AtlasContent:
    """Label the channels of a finished measurement, and return the content of the atlas."""
    settings = plan.settings
    layers: list[Mapping[str, np.ndarray]] = []
    inputs: list[Input] = []
    names = stored_names(plan.model, plan.source.index, [matrix.parameter for ffn in plan.ffns for matrix in ffn.other_maps])
    lost = 0
    supports: dict[str, tuple[int, np.ndarray]] = {}
    for place, group in itertools.groupby(
        zip(plan.ffns, measurement.statistics, strict=True), lambda item: (item[0].place, block_of(item[0].container))
    ):
        # All FFNs of a block read the residual stream behind the block before, and write to the block after.
        masses = []
        with _weights_of(plan, place[1]):
            for ffn, statistics in group:
                weights = (ffn_weights(plan.model, member) for member in ffn.members)
                dimensions, support = supports.get(place[0], (0, None))
                inputs += ffn_inputs(ffn, plan.slices[len(layers)], statistics, names)
                # Between two stages of a hierarchical model the residual dimensions change.
                variables, mass = layer_variables(
                    statistics, weights, settings, support if dimensions == ffn.read_inputs else None
                )
                if plan.columns is not None:
                    again = (ffn_weights(plan.model, member) for member in ffn.members)
                    variables |= ffn_columns(plan.columns, statistics, again, ffn.place)
                    lost += untraced(statistics)
                layers.append(measurement.laid_aside(len(layers), variables))
                masses.append(mass)
        supports[place[0]] = (
            len(masses[-1]),
            labels.top_indices(np.sum([mass for mass in masses if len(mass) == len(masses[-1])], axis=0), settings.support_size),
        )
    content = _content(plan, measurement, session, layers)
    if lost:
        say(
            f"note: it is not known which tokens reach {lost} of {len(plan.ffns)} FFNs, so columns that need it are unknown there"
        )
    return dataclasses.replace(content, extensions=(*content.extensions, inputs_group(inputs)))


def assemble_partial(
    plan: BuildPlan, measurement: Measurement, session: Session, request: Mapping[str, Any], environment: Mapping[str, Any]
) -> AtlasContent:
    """The content of a partial atlas: what is measured so far, and what the pass needs to continue.

    The partial atlas of a streamed build holds all sequences, but only the FFNs that are finished, which are the last ones
    of the model.

    Args:
        request, environment: See `chanfmt.building.state.REQUEST` and `chanfmt.building.state.ENVIRONMENT`.
    """
    state = measurement.state()
    if len(state.ffns) < len(plan.ffns):
        done = slice(len(plan.ffns) - len(state.ffns), None)
        plan = dataclasses.replace(plan, ffns=plan.ffns[done], slices=plan.slices[done], widths=plan.widths[done])
    layers = [measurement.laid_aside(number, partial_variables(item, plan.settings)) for number, item in enumerate(state.ffns)]
    content = _content(plan, measurement, session, layers)
    groups = extensions(state, content.blocks, content.stacks, request, environment)
    return dataclasses.replace(content, status="partial", extensions=groups)


@contextlib.contextmanager
def _weights_of(plan: BuildPlan, block: str | None) -> Iterator[None]:
    """In this context the model has the weights of ``block``, which a streamed model does not always have."""
    number = plan.streamed.chain.number_of(block) if plan.streamed and block else None
    if plan.streamed is None or number is None:
        yield
    else:
        with plan.streamed.chain.loaded(number):
            yield


def _content(plan: BuildPlan, measurement: Measurement, session: Session, layers: list[Mapping[str, np.ndarray]]) -> AtlasContent:
    stacks, positions = stack_layers(plan.ffns, layers, activation_name(plan.source.config), plan.settings.support_size)
    blocks = tuple(
        Block(
            index,
            ffn.layer_index,
            ffn.place,
            ffn.container,
            *position,
            ffn.width,
            ffn.experts,
            slices,
            width.field,
            width.factor,
            width.channel_parameters,
        )
        for index, (ffn, position, slices, width) in enumerate(zip(plan.ffns, positions, plan.slices, plan.widths, strict=True))
    )
    stacks, measured = _without_columns(stacks)
    content = AtlasContent(
        title=f"importance atlas of {plan.source.id}",
        model=plan.record,
        calibration=_calibration_record(plan, measurement),
        labels=plan.settings,
        core_rho=plan.settings.rho,
        blocks=blocks,
        stacks=tuple(stacks),
        producer=producer_record(session, plan.model),
    )
    return _described(with_columns(content, measured), plan.columns)


def _described(content: AtlasContent, columns: ColumnPlan | None) -> AtlasContent:
    """``content``, whose groups of measured columns say what they rest on."""
    if columns is None:
        return content
    places = {f"{OWNER}/{block.stack}": block.place for block in content.blocks}
    groups = tuple(dataclasses.replace(group, attributes=columns.attributes(places[group.path])) for group in content.extensions)
    return dataclasses.replace(content, extensions=groups)


def _without_columns(stacks: Sequence[StackData]) -> tuple[list[StackData], dict[str, dict[str, np.ndarray]]]:
    """``stacks`` without the columns among their arrays; and the columns as `with_columns` takes them."""
    own: list[StackData] = []
    found: dict[str, dict[str, np.ndarray]] = {}
    for stack in stacks:
        variables = dict(stack.variables)
        for name in [name for name in variables if name not in schema.STACK_VARIABLE_BY_NAME]:
            found.setdefault(name, {})[stack.name] = np.stack(list(variables.pop(name)))
        own.append(dataclasses.replace(stack, variables=variables))
    return own, found


def _calibration_record(plan: BuildPlan, measurement: Measurement) -> CalibrationRecord:
    """The record of the sequences measured so far; of all sequences if the measurement is finished."""
    tokens, count = plan.tokens, measurement.sequences
    rows, source_of = contributions(plan.sources, tokens, count, plan.record)
    stored = isinstance(tokens, CalibrationTokens) and not plan.options.no_store_tokens
    return CalibrationRecord(
        loss=plan.loss.definition,
        metric_definition=schema.METRIC_DEFINITION,
        tokenizer=plan.source.id if isinstance(tokens, CalibrationTokens) else "",
        seq_len=tokens.seq_len,
        seed=plan.options.seed,
        mean_loss=measurement.mean_loss,
        sequence_sha256=tokens.sha256[:count],
        source_of=source_of,
        split_of=tokens.split_of[:count],
        contributions=rows,
        token_ids=tokens.ids[:count] if stored and isinstance(tokens, CalibrationTokens) else None,
        special_tokens=plan.special,
        tokenizer_special_tokens=plan.added,
    )


def activation_name(config: Any) -> str:
    """Name of the activation function in ``config``, or ``unknown``."""
    text = config.get_text_config()
    for name in ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act"):
        value = getattr(text, name, None)
        if isinstance(value, str):
            return value
    return "unknown"
