// @ts-check
// The preview of a sampling, as it moves: the server sends the predicted clip after every step, and this plays it where
// the front end shows its own previews, by giving it one frame after the other.

// @ts-ignore: served by ComfyUI
import { app } from "../../scripts/app.js";
// @ts-ignore: served by ComfyUI
import { api } from "../../scripts/api.js";

/** @typedef {{node: string, prompt: string, seconds: number, sheet: string, count: number, width: number,
 *   height: number}} Preview */

const EVENT = "ovi-native.preview";
const LONGEST_SIDE = 512; // pixels, as core's own previews
const FASTEST = 80; // milliseconds between frames
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];

/** What is being played. @type {{preview: Preview, frames: Blob[], shown: number, timer: number} | null} */
let playing = null;
/** The node that runs. @type {string | null} */
let running = null;

/** @param {Preview} preview @returns {Promise<Blob[]>} */
async function cut(preview) {
  const image = new Image();
  image.src = `data:image/jpeg;base64,${preview.sheet}`;
  await image.decode();
  const { width, height, count } = preview;
  const scale = LONGEST_SIDE / Math.max(width, height);
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  const frames = [];
  for (let i = 0; i < count; i++) {
    context?.drawImage(image, 0, i * height, width, height, 0, 0, canvas.width, canvas.height);
    frames.push(await new Promise(resolve => canvas.toBlob(resolve, "image/jpeg", 0.9)));
  }
  return frames;
}

function stop() {
  if (playing) clearInterval(playing.timer);
  playing = null;
}

function show() {
  if (!playing) return;
  const { preview, frames, shown } = playing;
  playing.shown = (shown + 1) % frames.length;
  const ids = { nodeId: preview.node, displayNodeId: preview.node, parentNodeId: preview.node, realNodeId: preview.node };
  api.dispatchCustomEvent("b_preview_with_metadata", { blob: frames[shown], jobId: preview.prompt, ...ids });
}

/** @param {{detail: Preview}} event */
async function onPreview({ detail }) {
  const frames = await cut(detail);
  if (running !== detail.node) return; // it finished meanwhile
  if (playing && playing.preview.prompt === detail.prompt && playing.preview.node === detail.node
    && playing.frames.length === frames.length) {
    playing.frames = frames; // the clip goes on where it was
    return;
  }
  stop();
  const pause = Math.max(FASTEST, 1000 * detail.seconds / frames.length);
  playing = { preview: detail, frames, shown: 0, timer: window.setInterval(show, pause) };
  show();
}

app.registerExtension({
  name: "ovi-native.preview",
  setup() {
    api.addEventListener(EVENT, onPreview);
    api.addEventListener("executing", (/** @type {{detail: string | null}} */ { detail }) => {
      running = detail;
      if (playing && detail !== playing.preview.node) stop();
    });
    for (const end of ENDS) {
      api.addEventListener(end, () => {
        running = null;
        stop();
      });
    }
  },
});
