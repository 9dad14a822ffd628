"""Everything Label Studio is shown of a bag: heatmap, brush RLE, top-k rectangles, contours; for bags of 1 000 to 100 000 tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from backend.bench.material import grid_bag, some_result
from backend.bench.measure import Figure, Plan, below, interleaved
from backend.label_studio.labeling_config import parse_config
from backend.label_studio.regions import predict_regions
from backend.results.bag import BagResult
from backend.slides.render import heatmap_image

CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="attention" toName="image"><Label value="Attention"/></BrushLabels>
  <RectangleLabels name="hot" toName="image"><Label value="Hot tile"/></RectangleLabels>
  <PolygonLabels name="area" toName="image"><Label value="Hot area"/></PolygonLabels>
  <TextArea name="summary" toName="image"/>
</View>"""
IMAGE_PX = 2000


def run(plan: Plan) -> list[Figure]:
    """Milliseconds for the regions, and for the heatmap's picture, by number of tiles."""
    figures = []
    config = parse_config(CONFIG)
    for tiles in {"smallest": (100,), "quick": (1_000, 10_000), "full": (1_000, 10_000, 100_000)}[plan.size]:
        edge = math.ceil(math.sqrt(tiles) * plan.settings.tile_px)
        bag = grid_bag((edge, edge), plan.settings.tile_mpp, plan.settings)
        result = some_result(bag)

        def regions(result: BagResult = result) -> object:
            return predict_regions(
                replace(result),  # a result remembers its softmax; a copy is as a stored bag is when it is read
                config,
                image_size=(IMAGE_PX, IMAGE_PX),
                model_version="benchmark",
                settings_top_k=10,
            )

        def heatmap(result: BagResult = result) -> object:
            return heatmap_image(replace(result))

        ways: dict[str, Callable[[], object]] = {"regions": regions, "heatmap": heatmap}
        timings = interleaved(ways, plan.rounds)
        name, milliseconds = f"regions, {len(bag)} tiles", 1000 * timings.median("regions")
        note = f"brush, rectangles, polygons, summary on {IMAGE_PX} px"
        if tiles == 10_000:
            figures.append(below("pictures", name, milliseconds, 60, "ms", note))
        else:
            figures.append(Figure("pictures", name, milliseconds, "ms", note=note))
        figures.append(Figure("pictures", f"heatmap grid, {len(bag)} tiles", 1000 * timings.median("heatmap"), "ms"))
    return figures
