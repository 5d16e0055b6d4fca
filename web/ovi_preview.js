// @ts-check
// The preview of a sampling, as it moves: the server sends the predicted clip after every step, and this plays it where
// the front end shows its own previews, by giving it one frame after the other.

// @ts-ignore: served by ComfyUI
import { app } from "../../scripts/app.js";
// @ts-ignore: served by ComfyUI
import { api } from "../../scripts/api.js";

/** @typedef {{node: string, prompt_id: string, seconds: number, sheet: string, count: number, width: number,
 *   height: number}} Preview `sheet`: `count` frames below each other, a JPEG in base64 */

const EVENT = "ovi-native.preview";
const LONGEST_SIDE = 512; // pixels, as core's own previews
const FASTEST = 80; // milliseconds between frames
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];

/** What is being played. @type {{preview: Preview, image: HTMLImageElement, shown: number} | null} */
let playing = null;
let timer = 0;
/** The node that runs. @type {string | null} */
let running = null;
const canvas = document.createElement("canvas");

/** @param {{detail: Preview}} event */
async function onPreview({ detail }) {
  const image = new Image();
  image.src = `data:image/jpeg;base64,${detail.sheet}`;
  await image.decode();
  if (running !== detail.node) return; // it finished meanwhile
  const goesOn = playing?.preview.node === detail.node && playing.preview.count === detail.count;
  if (!goesOn) stop();
  playing = { preview: detail, image, shown: goesOn && playing ? playing.shown : 0 };
  if (!timer) {
    timer = window.setInterval(show, Math.max(FASTEST, 1000 * detail.seconds / detail.count));
    show();
  }
}

/** Give the front end the next frame. What is drawn becomes a JPEG at once: `toBlob` waits until a busy page rests. */
function show() {
  if (!playing) return;
  const { preview, image, shown } = playing;
  const { node, width, height, count } = preview;
  playing.shown = (shown + 1) % count;
  const scale = LONGEST_SIDE / Math.max(width, height);
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.getContext("2d")?.drawImage(image, 0, shown * height, width, height, 0, 0, canvas.width, canvas.height);
  const jpeg = atob(canvas.toDataURL("image/jpeg", 0.9).split(",")[1]);
  const blob = new Blob([Uint8Array.from(jpeg, character => character.charCodeAt(0))], { type: "image/jpeg" });
  const ids = { nodeId: node, displayNodeId: node, parentNodeId: node, realNodeId: node };
  api.dispatchCustomEvent("b_preview_with_metadata", { blob, jobId: preview.prompt_id, ...ids });
}

function stop() {
  clearInterval(timer);
  timer = 0;
  playing = null;
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
