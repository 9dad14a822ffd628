"""Run in a checkout of CLAM, as ``python read_by_clam.py EXPORT SLIDE NAME WORK``: what it makes of our files, as JSON.

EXPORT is the folder that ``export-features --layout clam`` wrote, SLIDE the slide's file, NAME its name in the export,
WORK a folder to write to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, "")  # CLAM is imported from where this runs

import h5py
import numpy as np
import openslide
import pandas as pd
import torch
from dataset_modules.dataset_generic import Generic_MIL_Dataset
from dataset_modules.dataset_h5 import Whole_Slide_Bag_FP
from torch.utils.data import DataLoader
from torchvision import transforms
from vis_utils.heatmap_utils import drawHeatmap
from wsi_core.WholeSlideImage import WholeSlideImage


def main(export: Path, slide: Path, name: str, work: Path) -> None:
    """Read patches, features as .h5 and .pt, and draw the heatmap."""
    said: dict[str, object] = {}
    to_tensor = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    patches = export / "patches" / f"{name}.h5"
    bag = Whole_Slide_Bag_FP(file_path=str(patches), wsi=openslide.open_slide(slide), img_transforms=to_tensor)
    batches = list(DataLoader(bag, batch_size=16))
    said["patches"] = len(bag)
    said["patch_size"] = int(bag.patch_size)
    images = torch.cat([batch["img"] for batch in batches])
    said["mean"] = [round(float(v), 4) for v in images.mean(dim=(1, 2, 3))]
    said["coords"] = torch.cat([batch["coord"] for batch in batches]).tolist()

    (features,) = export.glob("features_*")
    table = work / "dataset.csv"
    pd.DataFrame({"case_id": ["p1"], "slide_id": [name], "label": ["tumour"]}).to_csv(table, index=False)
    dataset = Generic_MIL_Dataset(
        data_dir=str(features), csv_path=str(table), label_dict={"tumour": 0}, shuffle=False, print_info=False
    )
    from_pt, label = dataset[0]
    dataset.load_from_h5(True)
    from_h5, _, coords = dataset[0]
    said["features"] = [
        list(from_pt.shape),
        str(from_pt.dtype),
        str(from_h5.dtype),
        bool(torch.equal(from_pt, from_h5)),
    ]
    said["label"], said["coords_same"] = int(label), coords.tolist() == said["coords"]

    with h5py.File(features / "h5_files" / f"{name}.h5") as h5:
        scores, at = h5["attention_scores"][:], h5["coords"][:]
    wsi = WholeSlideImage(str(slide))
    heatmap = drawHeatmap(
        scores, at, str(slide), wsi_object=wsi, vis_level=0, patch_size=(bag.patch_size,) * 2,
        blank_canvas=True, segment=False, convert_to_percentiles=True,
    )  # fmt: skip
    heatmap.save(work / "clam.png")
    said["painted"] = np.argwhere((np.asarray(heatmap) < 250).any(axis=2)).min(axis=0).tolist()[::-1]
    (work / "clam.json").write_text(json.dumps(said))


main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
