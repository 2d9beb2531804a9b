// The labels, or without any the image, in three dimensions: volume rendering by NiiVue.
import { Niivue } from "./niivue.js";

const RENDER = 4; // NiiVue's number of this view
const SHADED = 0.6;

export class Solid {
  constructor(canvas, oriented) {
    this.canvas = canvas;
    this.nv = new Niivue({
      backColor: [0, 0, 0, 1], isOrientCube: oriented, show3Dcrosshair: false, crosshairWidth: 0, loadingText: "",
      dragAndDropEnabled: false, forceDevicePixelRatio: 1,
    });
  }

  async open() {
    await this.nv.attachToCanvas(this.canvas);
    this.nv.setSliceType(RENDER);
    await this.nv.setVolumeRenderIllumination(SHADED);
    return this;
  }

  // table: the colour of each value of a label map as 0xAABBGGRR; window: the grey levels of an image
  async show(volume, { table, window }) {
    if (this.url !== volume.url) {
      this.url = volume.url;
      const [low, high] = window ?? [0, 1];
      await this.nv.loadVolumes([{ url: volume.url, name: volume.url, colormap: "gray", cal_min: low, cal_max: high }]);
    }
    const shown = this.nv.volumes[0];
    if (table) {
      shown.img = volume.voxels;
      const part = (bits) => table.map((colour) => (colour >>> bits) & 255);
      const I = table.map((_, i) => i);
      shown.setColormapLabel({ R: part(0), G: part(8), B: part(16), A: part(24), I, labels: I.map(String) });
    }
    this.nv.updateGLVolume();
  }
}
