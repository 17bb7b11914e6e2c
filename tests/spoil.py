"""How a checkpoint is spoilt: one function per kind of lie, grouped by the part that lies."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import INDEX, Choices, Draft, Raw, Sheet, finish, link, valid

DTYPES = [
    "F32", "BF16", "F16", "F64", "U8", "I8", "BOOL", "I64", "U64", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3",
    "C64", "f32", "", "I4", "float32", "__import__('os')",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 7, 9, 64, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
]  # fmt: skip
DEEP = Raw("[" * 100_000)  # more levels than any parser follows
STEEP = Raw("[" * 900 + "]" * 900)  # as deep as Python reads, and cannot write
WIDE = Raw("9" * 10_000)  # more digits than Python reads
ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 1e308, "", "x", [], {}, [[]], {"a": {}}, "../x", DEEP, 2**63, 2**64,
    10**30, float("nan"), float("inf"), "\ud800", "\x00", "x" * 3000, ["x"] * 300, WIDE, STEEP,
]  # fmt: skip
NAMES = [
    "", "x", "\x00", "a\nb", "\x1b[31mred", "x" * 3000, "../../outside/model", "/etc/passwd", "\u202e", "a.b",
    "__metadata__", "model.layers.9.w.weight", "model.layers.²." + "9" * 5000 + ".w.weight",
]  # fmt: skip
PATHS = [
    "../outside/model.safetensors", "/etc/passwd", "..\\outside\\model.safetensors", "~/x.safetensors",
    "./model.safetensors", "model.safetensors/", "MODEL.SAFETENSORS", "a/../../outside/model.safetensors",
    "file:///etc/passwd", "http://127.0.0.1:9/x", "", ".", "..", "config.json", "\x00", "x" * 3000, "sub",
    "sub/model.safetensors", "C:\\x.safetensors", "//etc/passwd", "model.bin", "\ud800.safetensors",
]  # fmt: skip
PATTERNS = [
    "1:4", "4:2", "2:2", "0:4", "2:3", "2:4 ", "2:4\n", "02:4", "9999:9999", "unstructured", "٢:٤", "5:8",
]  # fmt: skip
TEXTS = [
    "", "1", "2", "1.0", " 1", "{}", "[]", "null", "[" * 9999, "{" * 99, '{"a":1}', '{"a":{}}', '{"":{}}',
    "\ud800", "9" * 9999, "1" + "0" * 3000,
]  # fmt: skip
FIELDS = [
    "model_type", "architectures", "quantization_config", "dtype", "torch_dtype", "vocab_size", "hidden_size",
    "num_hidden_layers", "num_attention_heads", "tie_word_embeddings", "auto_map", "rope_parameters",
    "_attn_implementation", "attn_implementation", "trust_remote_code", "text_config", "intermediate_size",
    "head_dim", "hidden_act", "transformers_weights", "layer_types", "format_version", "patterns",
]  # fmt: skip
TOKENIZERS = [
    "fast_tokenizer_files", "tokenizer_file", "vocab_file", "merges_file", "auto_map", "tokenizer_class",
    "chat_template", "added_tokens_decoder", "model_max_length", "extra_special_tokens", "init_inputs",
]  # fmt: skip
CODE = {
    "AutoConfig": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", None],
}
VALUES: list[Any] = [
    *ODD, CODE, "evil", "llmprune", "bitsandbytes", "gptq", "gpt2", "os", "load", "float32", ["evil.Evil"],
    ["BertModel"], [None], ["LlamaForCausalLM"] * 2, "evil/kernel:run", 4, 10**6, 3,
    "../outside/model.safetensors", "outside/model.safetensors", "adapter_model.bin",
    *({"quant_method": v} for v in ("llmprune", "gptq", "evil", None, [], 1, "../evil")),
    *({"quant_method": "llmprune", "format_version": v} for v in (2, "1", None, True, 1.0, [])),
]  # fmt: skip
TARGETS = [
    "../outside/model.safetensors", "/etc/passwd", "../outside/secret.json", "../outside", "/",
    "../outside/config.json", "/dev/zero", "/proc/self/environ", "../folder/../outside/evil.py",
]  # fmt: skip
FILES = [
    "x.safetensors", "a\nb.safetensors", "\x1b[31m.safetensors", "pytorch_model.bin", "\udcff.safetensors",
    "consolidated.safetensors", "adapter_config.json", "tokenizer_config.json", "generation_config.json",
]  # fmt: skip

Mutation = Callable[[Draft, Choices], None]


def _sheet(draft: Draft, choices: Choices) -> Sheet:
    return draft.sheets[choices.one(sorted(draft.sheets))]


def _entry(sheet: Sheet, choices: Choices) -> list[Any]:
    tensors = [e for e in sheet.entries if e[0] != "__metadata__"]
    return choices.one(tensors) if tensors else ["", {}]


def dtype_lies(draft: Draft, choices: Choices) -> None:
    about = _entry(_sheet(draft, choices), choices)[1]
    if isinstance(about, dict):
        about["dtype"] = choices.one(DTYPES)


def shape_lies(draft: Draft, choices: Choices) -> None:
    about = _entry(_sheet(draft, choices), choices)[1]
    if not isinstance(about, dict):
        return
    shape = about.get("shape")
    kind = choices.below(6)
    if kind == 0 or not isinstance(shape, list) or not shape:
        about["shape"] = [choices.one(NUMBERS) for _ in range(choices.below(4))]
    elif kind == 1:
        shape[choices.below(len(shape))] = choices.one(NUMBERS)
    elif kind == 2:
        shape.append(1)
    elif kind == 3:
        about["shape"] = shape[::-1]
    elif kind == 4:
        about["shape"] = [1] * choices.one([5, 65, 3000]) + shape
    else:
        about["shape"] = choices.one(ODD)


def empty_and_huge(draft: Draft, choices: Choices) -> None:
    """No bytes, and a dimension that no integer of torch holds."""
    shape = [
        choices.one([0, 1, 2**40, 2**62, 2**63, 2**64 - 1]) for _ in range(1 + choices.below(3))
    ]
    shape.insert(choices.below(len(shape) + 1), 0)
    sheet = _sheet(draft, choices)
    sheet.add(choices.one(NAMES), choices.one(DTYPES), shape, b"")


def offsets_lie(draft: Draft, choices: Choices) -> None:
    about = _entry(_sheet(draft, choices), choices)[1]
    if isinstance(about, dict):
        about["data_offsets"] = choices.one(
            [[0, 4], [4, 0], [0, 2**63], [2**64 - 4, 2**64], [], [0], [0, 1, 2], "0", [-4, 0], None]
        )


def entry_is_odd(draft: Draft, choices: Choices) -> None:
    _entry(_sheet(draft, choices), choices)[1] = choices.one(ODD)


def field_is_odd(draft: Draft, choices: Choices) -> None:
    about = _entry(_sheet(draft, choices), choices)[1]
    if isinstance(about, dict):
        about[choices.one(["dtype", "shape", "data_offsets", "more"])] = choices.one(ODD)


def renamed(draft: Draft, choices: Choices) -> None:
    sheet = _sheet(draft, choices)
    entry, other = _entry(sheet, choices), _entry(sheet, choices)
    suffix = choices.one(["", "_values", "_bitmap", "_scale", ".0"])
    entry[0] = choices.one([*NAMES, other[0] + suffix, other[0].upper(), other[0] + " "])


def twice(draft: Draft, choices: Choices) -> None:
    """One name, two tensors: in one file, or in two."""
    entry = _entry(_sheet(draft, choices), choices)
    sheet = _sheet(draft, choices)
    if choices.below(2) or not isinstance(entry[1], dict) or "shape" not in entry[1]:
        sheet.entries.insert(choices.below(len(sheet.entries) + 1), list(entry))
    else:
        sheet.add(entry[0], "F32", [2], bytes(8))


def gone(draft: Draft, choices: Choices) -> None:
    sheet = _sheet(draft, choices)
    sheet.entries.remove(_entry(sheet, choices)) if len(sheet.entries) > 1 else None


def many(draft: Draft, choices: Choices) -> None:
    """A header of very many empty tensors."""
    sheet = _sheet(draft, choices)
    for i in range(choices.one([100, 100, 100, 3000])):
        sheet.add(f"model.layers.{i}.w.weight", "F32", [0, 4], b"")


def _specs(draft: Draft, choices: Choices) -> dict[str, Any]:
    about = _sheet(draft, choices).get("__metadata__")
    packed = about.get("llmprune.packed") if isinstance(about, dict) else None
    return packed if isinstance(packed, dict) else {}


def spec_is_odd(draft: Draft, choices: Choices) -> None:
    specs = _specs(draft, choices)
    if not specs:
        return
    spec = specs[choices.one(sorted(specs))]
    if not isinstance(spec, dict):
        return
    key = choices.one(["shape", "dtype", "pattern", "axis", "bits", "group", "kept", "more"])
    value = choices.one(ODD)
    spec[key] = "x" if isinstance(value, Raw) else value
    if choices.below(8) == 7:
        spec.pop(key, None)


def spec_shape(draft: Draft, choices: Choices) -> None:
    specs = _specs(draft, choices)
    spec = specs[choices.one(sorted(specs))] if specs else {}
    shape = spec.get("shape") if isinstance(spec, dict) else None
    if not isinstance(shape, list) or not shape:
        return
    kind = choices.below(7)
    if kind == 0:
        shape[choices.below(len(shape))] = choices.one([*NUMBERS, True, 8.0, "8", None])
    elif kind == 1:
        spec["shape"] = [choices.one(NUMBERS) for _ in range(choices.below(5))]
    elif kind == 2:
        spec["shape"] = shape[::-1]
    elif kind == 3:
        shape[-1] -= 1 + choices.below(7)
    elif kind == 4:
        spec["shape"] = [True] * choices.one([1, 2, 100, 3000]) + shape
    elif kind == 5:
        spec["shape"] = [1] * choices.one([1, 2, 100, 3000]) + shape
    else:
        spec["shape"] = [2**62] * choices.one([2, 100, 3000])


def spec_claims(draft: Draft, choices: Choices) -> None:
    """Another pattern, axis, dtype, or others of its numbers than the file holds."""
    specs = _specs(draft, choices)
    spec = specs[choices.one(sorted(specs))] if specs else {}
    if not isinstance(spec, dict):
        return
    claims: dict[str, list[Any]] = {
        "pattern": PATTERNS,
        "axis": ["columns", "rows", "Rows", ""],
        "dtype": DTYPES,
        "bits": [4, 8, *NUMBERS],
        "group": NUMBERS,
        "kept": NUMBERS,
    }
    key = choices.one(["pattern", "axis", "dtype", *(k for k in claims if k in spec)])
    spec[key] = choices.one(claims[key])


def spec_name(draft: Draft, choices: Choices) -> None:
    """A matrix under another name, perhaps that of a part of another."""
    specs = _specs(draft, choices)
    if not specs:
        return
    name, other = choices.one(sorted(specs)), choices.one(sorted(specs))
    parts = (other + part for part in ("_values", "_bitmap", "_whole", "_scales"))
    new = choices.one([*NAMES, *parts, "lm_head.weight", name[:-1]])
    spec = specs.pop(name) if choices.below(2) else specs[name]
    specs[new] = spec
    if choices.below(2) == 0:  # its parts go with it
        for sheet in draft.sheets.values():
            for entry in sheet.entries:
                for part in ("_values", "_bitmap", "_whole", "_scales"):
                    entry[0] = new + part if entry[0] == name + part else entry[0]


def spec_twice(draft: Draft, choices: Choices) -> None:
    """Duplicate keys, in JSON inside of JSON."""
    about = _sheet(draft, choices).get("__metadata__")
    if isinstance(about, dict) and isinstance(about.get("llmprune.packed"), dict):
        about["llmprune.packed"] = _doubled(about["llmprune.packed"], choices)


def _doubled(specs: dict[str, Any], choices: Choices) -> str:
    name = choices.one(sorted(specs))
    if choices.below(2):
        return json.dumps(specs)[:-1] + f',{json.dumps(name)}:{{"shape":[1,1]}}' + "}"
    return json.dumps(specs, default=str).replace('"dtype"', '"dtype":"F16","dtype"', 1)


def metadata_is_odd(draft: Draft, choices: Choices) -> None:
    sheet = _sheet(draft, choices)
    about = sheet.get("__metadata__")
    if not isinstance(about, dict):
        return
    key = choices.one(["llmprune.format_version", "llmprune.packed", "format", "llmprune.more"])
    kind = choices.below(3)
    if kind == 0:
        about.pop(key, None)
    else:
        about[key] = choices.one(TEXTS if kind == 1 else ODD)


def content_lies(draft: Draft, choices: Choices) -> None:
    """Bits and values that disagree, bits behind the last column, NaN; wrong whole numbers and scales."""
    sheet = _sheet(draft, choices)
    entry = _entry(sheet, choices)
    for _ in range(8):
        lies = entry[0].endswith(("_bitmap", "_whole", "_scales"))
        entry = entry if lies else _entry(sheet, choices)
    try:
        begin, end = entry[1]["data_offsets"]
        for _ in range(1 + choices.below(3)):
            sheet.data[begin + choices.below(end - begin)] ^= 1 << choices.below(8)
    except (TypeError, KeyError, ValueError, IndexError, ZeroDivisionError):
        return


def fewer_values(draft: Draft, choices: Choices) -> None:
    """The values of the last tensor cut, or one too many, in a header that agrees with itself."""
    sheet = _sheet(draft, choices)
    names = [k for k, _ in sheet.entries if k.endswith("_values")]
    if not names:
        return
    name = choices.one(names)
    about = sheet.get(name)
    sheet.entries.remove([name, about])
    count = choices.one([0, 1, 31, 33, 64, 95, 97, 1000])
    sheet.entries = [e for e in sheet.entries if e[0] != "hole"]
    hole = about["data_offsets"] if isinstance(about, dict) else [0, 0]
    if isinstance(hole, list) and len(hole) == 2 and isinstance(hole[1], int):
        sheet.entries.append(["hole", {**about, "dtype": about.get("dtype")}])
    sheet.add(name, "F32", [count], bytes(4 * count))


def _weight_map(draft: Draft) -> dict[str, Any]:
    """That of the index; where there is none, one is made, and the single file is renamed."""
    if INDEX not in draft.objects:
        names = [k for s in draft.sheets.values() for k, _ in s.entries if k != "__metadata__"]
        draft.objects[INDEX] = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
        if "model.safetensors" in draft.sheets:
            draft.sheets["model-1.safetensors"] = draft.sheets.pop("model.safetensors")
    index = draft.objects[INDEX]
    found = index.get("weight_map") if isinstance(index, dict) else None
    return found if isinstance(found, dict) else {}


def index_path(draft: Draft, choices: Choices) -> None:
    table = _weight_map(draft)
    if table:
        table[choices.one([*sorted(table), *NAMES])] = choices.one(PATHS)


def index_everywhere(draft: Draft, choices: Choices) -> None:
    table, path = _weight_map(draft), choices.one(PATHS)
    for key in table:
        table[key] = path


def index_is_odd(draft: Draft, choices: Choices) -> None:
    table = _weight_map(draft)
    kind = choices.below(5)
    if kind == 0 and table:
        table[choices.one(sorted(table))] = choices.one(ODD)
    elif kind == 1:
        draft.objects[INDEX] = choices.one([*ODD, {"weight_map": choices.one(ODD)}])
    elif kind == 2 and table:
        del table[choices.one(sorted(table))]
    elif kind == 3 and table:
        table[choices.one(NAMES)] = choices.one(sorted(draft.sheets))
    else:
        table[choices.one(sorted(table) or ["x"])] = choices.one(sorted(draft.sheets))


def config_field(draft: Draft, choices: Choices) -> None:
    name = choices.one([n for n in sorted(draft.objects) if n != INDEX] or ["config.json"])
    found = draft.objects.setdefault(name, {})
    if isinstance(found, dict):
        key = choices.one([*FIELDS, *(k for k in sorted(found) if isinstance(k, str))])
        found[key] = choices.one(VALUES)
    draft.changes.append(_evil)


def _evil(folder: Path) -> None:
    """Code beside the config, which nobody may run."""
    (folder / "evil.py").write_text("class Evil: pass\nopen('evil-was-here', 'w')\n")


def config_code(draft: Draft, choices: Choices) -> None:
    found = draft.objects.setdefault("config.json", {})
    if isinstance(found, dict):
        found["auto_map"] = CODE
        found["trust_remote_code"] = True
        found["model_type"] = choices.one(["llama", "evil", "gpt2"])
        found["architectures"] = choices.one([["LlamaForCausalLM"], ["Evil"], ["evil.Evil"]])
    draft.changes.append(_evil)


def tokenizer_lies(draft: Draft, choices: Choices) -> None:
    """Files of the tokenizer that are elsewhere, code, and settings of wrong types."""
    name = choices.one(["tokenizer_config.json", "tokenizer_config.json", "tokenizer.json"])
    found = draft.objects.setdefault(name, {})
    if not isinstance(found, dict):
        return
    key = choices.one([*TOKENIZERS, *sorted(found)])
    path = choices.one(["outside/tokenizer.1.json", "../outside/tokenizer.1.json", "/etc/passwd"])
    found[key] = choices.one([path, [path], {"AutoTokenizer": ["evil.Evil", None]}, *ODD])
    draft.changes.append(_evil)


def adapter(draft: Draft, choices: Choices) -> None:
    """An adapter beside the model, whose base is elsewhere."""
    base = choices.one(["outside", "../outside", "/etc", "ann/base", None])
    draft.objects["adapter_config.json"] = {"base_model_name_or_path": base, "peft_type": "LORA"}
    draft.changes.append(
        lambda folder: (folder / "adapter_model.bin").write_bytes(b"\x80\x04.") and None
    )


def object_is_odd(draft: Draft, choices: Choices) -> None:
    draft.objects[choices.one(sorted(draft.objects) or ["config.json"])] = choices.one(ODD)


def _rewrite(name: str, edit: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        if path.is_file() and not path.is_symlink():
            path.write_bytes(edit(bytearray(path.read_bytes())))

    return change


def bytes_lie(draft: Draft, choices: Choices) -> None:
    names = [*sorted(draft.sheets), *sorted(draft.sheets), *sorted(draft.objects)]
    name, kind, at = choices.one(names), choices.below(6), choices.below(2**20)
    value, length = (
        choices.below(256),
        choices.one([0, 1, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1]),
    )

    def edit(content: bytearray) -> bytes | bytearray:
        here = at % (len(content) + 1)
        if kind == 0:
            return content[:here]
        if kind == 1:
            return content + bytes([value]) * (1 + at % 64)
        if kind == 2:
            return length.to_bytes(8, "little") + content[8:]
        if kind == 3:
            return content[:here] + bytes([value]) + content[here:]
        for i in range(1 + at % 3):
            content[(here + 7 * i) % max(1, len(content)) : here + 7 * i + 1] = bytes([value])
        return content

    draft.changes.append(_rewrite(name, edit))


def _names(draft: Draft) -> list[str]:
    return [
        *sorted(draft.sheets),
        *sorted(draft.objects),
        "tokenizer.json",
        "sub",
        "evil.safetensors",
    ]


def link_out(draft: Draft, choices: Choices) -> None:
    name = choices.one(_names(draft))
    draft.changes.append(link(choices.one(TARGETS), name))


def link_in(draft: Draft, choices: Choices) -> None:
    """Links that stay inside, or lead nowhere or round in circles."""
    name, target = choices.one(_names(draft)), choices.one(_names(draft))
    draft.changes.append(
        link(choices.one([target, name, ".", "nowhere", "../folder/" + target]), name)
    )


def not_a_file(draft: Draft, choices: Choices) -> None:
    name, kind = choices.one(_names(draft)), choices.below(4)

    def change(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        if kind == 0:
            path.mkdir()
        elif kind == 1:
            os.mkfifo(path)
        elif kind == 2:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path))

    draft.changes.append(change)


def more_files(draft: Draft, choices: Choices) -> None:
    """Other files, which a reader without an index takes for shards, or which hold code."""
    name = choices.one(FILES)
    content = choices.one(
        [b"", b"{}", b"\x80\x04.", b'{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}']
    )
    if choices.below(3) == 2:
        draft.sheets = {f"part-{i}.safetensors": s for i, s in enumerate(draft.sheets.values())}
        draft.objects.pop(INDEX, None)
    if choices.below(2):
        content = next(iter(draft.sheets.values())).bytes() if draft.sheets else b""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)  # it may be a link by now
        (folder / name).write_bytes(content)
        _evil(folder)

    draft.changes.append(change)


PARTS: dict[str, list[Mutation]] = {
    "bytes": [bytes_lie],
    "header": [
        dtype_lies, shape_lies, empty_and_huge, offsets_lie, entry_is_odd, field_is_odd,
        renamed, twice, gone, many,
    ],
    "metadata": [spec_is_odd, spec_shape, spec_claims, spec_name, spec_twice, metadata_is_odd],
    "content": [content_lies, fewer_values],
    "index": [index_path, index_everywhere, index_is_odd],
    "config": [config_field, config_code, object_is_odd, tokenizer_lies, adapter],
    "folder": [link_out, link_in, not_a_file, more_files],
}  # fmt: skip


def spoilt(data: bytes) -> Draft:
    """The checkpoint that `data` stands for."""
    choices = Choices(data)
    sparse = choices.below(4) > 0
    draft = valid(
        sparse=sparse,
        shards=1 + choices.below(2),
        dtype=choices.one(["F32", "BF16", "F16"]),
        axis=choices.one(["rows", "rows", "columns"]),
        bits=choices.one([0, 0, 4, 8]),
    )
    last: list[tuple[str, Mutation]] = []
    for _ in range(choices.one([1, 1, 1, 2, 3])):
        part = choices.one(sorted(PARTS))
        last.append((part, choices.one(PARTS[part])))
    for part, mutation in last:
        mutation(draft, choices)
        draft.parts.append(part)
    return finish(draft)
