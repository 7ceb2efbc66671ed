"""What is refused of an adapter's file or tensors: names, sizes, the loader's way."""

from collections.abc import Mapping, Set

from torch import Tensor

from pemn_surgery.adapters.config import PemnConfig
from pemn_surgery.adapters.files.contents import (
    KEY_PREFIX,
    AdapterFile,
    is_mask_key,
    plain_name,
)
from pemn_surgery.adapters.whole_modules import Shape, is_resized
from pemn_surgery.errors import ArchitectureError, ConfigError, MaskFormatError
from pemn_surgery.planning.plan import Owned, Plan


def check_file_fits(file: AdapterFile, plan: Plan, base_names: Set[str], sized: Set[str]) -> None:
    """Refuse an adapter of another architecture before anything changes (`ArchitectureError`).

    Names of the base's tensors are given because PEFT adds resized embeddings to a file. Layers at
    the sized paths may have another number of outputs where they are whole.
    """
    masks = {name: _shown_mask(mask.weights, mask.row_scales) for name, mask in file.masks.items()}
    targets = {item.name: _shown_mask(item.bits, item.row_scales) for item in plan.targets}
    others = {
        plain_name(key): _shown(shape, is_float=dtype.is_floating_point or dtype.is_complex)
        for key, (shape, dtype) in file.others.items()
    }
    shapes = {plain_name(key): shape for key, (shape, _) in file.others.items()}
    owned = {
        plain_name(item.name): _shown(_size_of(item, shapes, sized), is_float=item.is_float)
        for item in (*plan.owned, *plan.whole)
        if item.saved and not item.tied_to
    }
    extra = {name for name in others if name not in owned and name in base_names}
    compared = {name: held for name, held in others.items() if name not in extra}
    if file.wish.ignores_sizes:
        compared |= {name: owned[name] for name in compared if name in owned}
    differing = [
        *_differences(masks, targets, "no mask"),
        *_differences(compared, owned, "none"),
    ]
    if not differing:
        return
    remedy = ", or, if its modules have other names now, give key_mapping"
    if file.wish.ignores_sizes:
        remedy = "; ignore_mismatched_sizes leaves out other tensors of other sizes, never masks"
    message = (
        f"The adapter masks {len(masks)} tensors of {sum(file.sizes.values())} weights and has "
        f"{len(others)} others; the model has {len(targets)} of {plan.masked_weights} to mask. "
        f"{len(differing)} differ ({'; '.join(differing[:3])}{'; ...' * (len(differing) > 3)}). "
        f"Build the model that the adapter was trained for{remedy}"
        f"{_way_out(masks, targets, plan)}. Nothing was changed."
    )
    raise ArchitectureError(message)


def _size_of(item: Owned, shapes: Mapping[str, Shape], sized: Set[str]) -> Shape:
    """Return a tensor's shape; of a head that is saved whole with as many outputs as the file's."""
    path, _, _ = plain_name(item.name).rpartition(".")
    outputs = {shape[:1] for name, shape in shapes.items() if name.rpartition(".")[0] == path}
    given = shapes.get(plain_name(item.name), item.shape)
    is_free = item.path in sized and len(outputs) == 1 and is_resized(given, item.shape)
    return given if is_free else item.shape


def _way_out(masks: Mapping[str, str], targets: Mapping[str, str], plan: Plan) -> str:
    """Return how heads of several sizes share a model, if it is the last layer that differs."""
    differing = [name for name in targets if masks.get(name) != targets[name]]
    if masks.keys() != targets.keys() or differing != [plan.targets[-1].name]:
        return ""
    path = plan.targets[-1].path
    return (
        f"; or, if {path!r} is a head, train it whole, and tasks may have heads of different sizes "
        f"(PemnConfig(..., modules_to_save=[{path!r}]))"
    )


def check_loader_decodes(config: PemnConfig) -> None:
    """Refuse an adapter of coded masks where tensors are put in place as they are.

    Transformers' ``load_adapter`` does so, and with it ``from_pretrained`` of an adapter's folder:
    they ask for masks to be added here, then fill the places without asking anybody.

    Raises:
        MaskFormatError: If the adapter's file holds coded masks.
    """
    if config.coding != "bits" and config.origin.fingerprint is not None:
        message = (
            f"The adapter's masks are coded for files (coding={config.coding!r}), and "
            "transformers' load_adapter and from_pretrained put tensors in place without decoding "
            "them. Load it with PeftModel.from_pretrained(base, folder); or recode it: load it so, "
            'set model.peft_config["default"].coding = "bits", and save it again. Nothing was '
            "loaded."
        )
        raise MaskFormatError(message)


def check_without_base(file: AdapterFile) -> None:
    """Refuse an adapter with masks that only their base can decode (`MaskFormatError`)."""
    beside = [name for name, header in file.headers.items() if header.coding == "base"]
    if beside:
        message = (
            f"{len(beside)} of the {len(file.masks)} masks in {str(file.path)!r} are coded beside "
            f'the weights of their base (coding="base"), first {beside[0]!r}; files alone cannot '
            "be read. Load the adapter with PeftModel.from_pretrained(base, folder), set "
            'model.peft_config["default"].coding = "context", and save it again.'
        )
        raise MaskFormatError(message)


def check_can_rename(config: PemnConfig) -> None:
    """Refuse to rename the weights of an adapter whose numbers go by their names.

    Raises:
        ConfigError: If a seed draws each weight's own numbers, or which of them are masked, or
            masks are coded beside the base.
    """
    problem = ""
    if config.bank == "own" and config.bank_spec.generated:
        problem = f"bank_init={config.bank_init!r} draws each weight's numbers by its name"
    elif config.support is not None and config.support_by in ("seed", "rows"):
        problem = f"support_by={config.support_by!r} draws the masked weights by their names"
    elif config.support_others == "drawn":
        problem = 'support_others="drawn" draws a mask for each weight by its name'
    elif config.coding == "base":
        problem = 'coding="base" holds masks that only the base under its own names can read'
    if problem:
        message = (
            f"key_mapping cannot rename the weights of this adapter: {problem}. Load it onto a "
            "model with the names that it was trained with. Nothing was changed."
        )
        raise ConfigError(message)


def check_swap_fits(given: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """Refuse to put an adapter in the place of another that has other tensors.

    Sizes of masks are checked when they are loaded.

    Raises:
        ArchitectureError: If the two do not have the same masks, or other tensors of one shape.
    """
    differing = _differences(_kinds(given), _kinds(held), "none")
    if differing:
        message = (
            f"The adapter cannot take the other's place: {len(differing)} of their tensors differ "
            f"({'; '.join(differing[:3])}{'; ...' * (len(differing) > 3)}). Load it under a name "
            "of its own instead (load_adapter). Nothing was changed."
        )
        raise ArchitectureError(message)


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what each tensor is; a mask is one whether as bits or as scores."""
    kinds: dict[str, str] = {}
    for key, value in tensors.items():
        name = key.removeprefix(KEY_PREFIX)
        if is_mask_key(key):
            kinds[name.rpartition(".")[0]] = "a mask"
        else:
            is_float = value.is_floating_point() or value.is_complex()
            kinds[name] = _shown(tuple(value.shape), is_float=is_float)
    return kinds


def _differences(given: Mapping[str, str], wanted: Mapping[str, str], none: str) -> list[str]:
    """Return one sentence for each name that a file and a model disagree on."""
    return [
        f"{name}: file {given.get(name, none)}, model {wanted.get(name, none)}"
        for name in sorted({*given, *wanted})
        if given.get(name) != wanted.get(name)
    ]


def _shown_mask(weights: int, row_scales: int) -> str:
    return f"{weights} weights" + (f" and {row_scales} row scales" if row_scales else "")


def _shown(shape: tuple[int, ...], *, is_float: bool) -> str:
    return f"{'float' if is_float else 'integer'} {shape}"
