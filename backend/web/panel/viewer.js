// The slide at full depth (OpenSeadragon), the attention over it, and the scale bar. All lengths are level-0 pixels unless named.
import { colourTable } from "./colours.js";
import { tileUrl, tissueUrl } from "./server.js";

const OVERLAY_EDGE = 1;

/** The viewer of one slide. `view` holds what is shown: head, colours, opacity, threshold, smooth, shown, tissue. */
export class SlideViewer {
  constructor(stage, slide, { onTileFailed, onPoint }) {
    this.slide = slide;
    this.attention = null;
    this.view = null;
    this.selected = -1;
    this.tissue = null; // a picture over the whole slide, loaded when it is first to be shown
    this.canvas = stage.querySelector("#overlay");
    this.grid = document.createElement("canvas");
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const lastLevel = Math.ceil(Math.log2(Math.max(slide.width, slide.height)));
    // OpenSeadragon adds rules of its own unless it finds them there, and our content security policy forbids that. We do not need
    // them: this element, of no namespace that a browser knows, holds their place.
    const place = document.createElementNS("urn:wsc", "style");
    place.setAttribute("data-openseadragon-mobile-css", "true");
    document.head.append(place);
    this.osd = new OpenSeadragon.Viewer({
      element: stage.querySelector("#viewer"),
      drawer: "canvas",
      tileSources: {
        width: slide.width,
        height: slide.height,
        tileSize: slide.tile_px,
        tileOverlap: slide.overlap_px,
        minLevel: Math.min(8, lastLevel), // what lies below is one tile of less than 256 px each
        maxLevel: lastLevel,
        getTileUrl: tileUrl,
      },
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "TOP_RIGHT",
      navigatorSizeRatio: 0.14,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      maxZoomPixelRatio: 4,
      visibilityRatio: 0.3,
      animationTime: this.still ? 0 : 0.6,
      imageLoaderLimit: 4,
      timeout: 60000,
    });
    this.osd.innerTracker.keyHandler = null; // the page has keys of its own
    this.osd.innerTracker.keyDownHandler = null;
    this.osd.addHandler("update-viewport", () => this.draw());
    // Until the person moves, the whole slide stays in sight, also when the page around it changes.
    this.moved = false;
    for (const event of ["canvas-drag", "canvas-scroll", "canvas-pinch", "canvas-double-click", "navigator-click", "navigator-drag"]) {
      this.osd.addHandler(event, () => { this.moved = true; });
    }
    this.osd.addHandler("after-resize", () => {
      // OpenSeadragon sets its old zoom again when the handlers are through.
      queueMicrotask(() => {
        if (!this.moved) this.osd.viewport.goHome(true);
        this.draw();
      });
    });
    this.osd.addHandler("tile-load-failed", onTileFailed);
    this.osd.addHandler("open", () => this.draw());
    stage.addEventListener("pointermove", (event) => onPoint(this.pointAt(event)));
    stage.addEventListener("pointerleave", () => onPoint(null));
    this.bar = stage.querySelector("#scalebar");
    new ResizeObserver(() => this.draw()).observe(stage);
  }

  get image() {
    return this.osd.world.getItemAt(0);
  }

  /** Level-0 point under the pointer, `null` outside the slide. */
  pointAt(event) {
    if (!this.image) return null;
    const box = this.canvas.getBoundingClientRect();
    const point = this.image.viewerElementToImageCoordinates(new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top));
    const inside = point.x >= 0 && point.y >= 0 && point.x < this.slide.width && point.y < this.slide.height;
    return inside ? point : null;
  }

  zoom(factor) {
    this.moved = true;
    this.osd.viewport.zoomBy(factor);
    this.osd.viewport.applyConstraints();
  }

  move(dx, dy) {
    this.moved = true;
    const bounds = this.osd.viewport.getBounds();
    this.osd.viewport.panBy(new OpenSeadragon.Point(dx * bounds.width * 0.2, dy * bounds.height * 0.2));
    this.osd.viewport.applyConstraints();
  }

  home() {
    this.moved = false;
    this.osd.viewport.goHome();
  }

  /** Fly to a tile and frame it. */
  flyTo(tile) {
    this.moved = true;
    this.selected = tile;
    const [x, y] = this.attention.corner(tile);
    const size = this.attention.tileSize;
    const around = this.image.imageToViewportRectangle(x - size, y - size, 3 * size, 3 * size);
    this.osd.viewport.fitBoundsWithConstraints(around, this.still);
    this.draw();
  }

  /** Paint the grid, one pixel a tile: after the weights came, and after a control changed. */
  paint(attention, view) {
    this.attention = attention;
    this.view = view;
    const { columns, rows, tiles } = attention;
    const ranks = attention.ranks(view.head);
    const values = view.smooth ? attention.smoothed(view.head) : ranks;
    const table = colourTable(view.colours);
    const pixels = new ImageData(columns, rows);
    for (let i = 0; i < tiles; i += 1) {
      if (ranks[i] < view.threshold) continue;
      const at = 4 * (attention.row[i] * columns + attention.column[i]);
      const colour = 3 * Math.round(values[i] * 255);
      pixels.data[at] = table[colour];
      pixels.data[at + 1] = table[colour + 1];
      pixels.data[at + 2] = table[colour + 2];
      pixels.data[at + 3] = 255;
    }
    this.grid.width = columns;
    this.grid.height = rows;
    this.grid.getContext("2d").putImageData(pixels, 0, 0);
    this.draw();
  }

  /** The layer of tissue, once it is here. */
  loadTissue() {
    this.tissue = Object.assign(new Image(), { src: tissueUrl() });
    this.tissue.addEventListener("load", () => this.draw());
    this.tissue.addEventListener("error", () => { this.tissue = null; }); // asked for again when it is switched on again
  }

  /** Lay the grid over the slide as it lies now. */
  draw() {
    const box = this.canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    if (!this.image) return;
    const zero = this.image.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
    const far = this.image.imageToViewerElementCoordinates(new OpenSeadragon.Point(this.slide.width, this.slide.height));
    const scale = (far.x - zero.x) / this.slide.width; // screen pixels for one level-0 pixel
    this.drawScaleBar(scale);
    if (!this.attention || !this.view) return;
    // Coordinates are level-0 pixels from here on.
    context.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * zero.x, ratio * zero.y);
    const { tileSize, columns, rows } = this.attention;
    if (this.view.tissue && !this.tissue) this.loadTissue();
    if (this.view.tissue && this.tissue?.complete && this.tissue.naturalWidth) {
      context.imageSmoothingEnabled = false;
      context.drawImage(this.tissue, 0, 0, this.slide.width, this.slide.height);
    }
    if (this.view.shown) {
      context.save();
      context.beginPath();
      context.rect(0, 0, this.slide.width, this.slide.height); // the last tiles stick out of the slide
      context.clip();
      context.imageSmoothingEnabled = this.view.smooth;
      context.globalAlpha = this.view.opacity;
      context.drawImage(this.grid, 0, 0, columns * tileSize, rows * tileSize);
      context.restore();
    }
    if (this.selected >= 0) {
      const [x, y] = this.attention.corner(this.selected);
      for (const [colour, thickness] of [["#000", 4], ["#fff", 2]]) {
        context.lineWidth = (thickness * OVERLAY_EDGE) / scale;
        context.strokeStyle = colour;
        context.strokeRect(x, y, tileSize, tileSize);
      }
    }
  }

  drawScaleBar(scale) {
    const mpp = this.slide.mpp;
    this.bar.hidden = !mpp;
    if (!mpp) return;
    const [um, px] = roundLength(mpp / scale, 120);
    const text = um >= 1000 ? `${um / 1000} mm` : `${um} µm`;
    this.bar.querySelector("#scalebar-line").style.width = `${px}px`;
    this.bar.querySelector("#scalebar-text").textContent = text;
    this.bar.setAttribute("aria-label", `Scale bar: ${text}`);
    this.bar.dataset.um = um;
  }
}

/** The longest of 1, 2, 5 × 10^k µm that is at most `max` screen pixels long, and its length there; `um`: µm for one screen pixel. */
export function roundLength(um, max) {
  const most = um * max;
  const power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].map((step) => step * power).find((value) => value <= most) ?? power;
  return [Number(length.toPrecision(1)), length / um];
}
