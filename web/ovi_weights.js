// @ts-check
// "Ovi Weights": the list of files on the node, the button that downloads the missing ones, its progress.
// Nothing is downloaded without a click on that button and a yes to the question that follows.

// @ts-ignore: served by ComfyUI
import { app } from "../../scripts/app.js";
// @ts-ignore: served by ComfyUI
import { api } from "../../scripts/api.js";

/**
 * @typedef {{id: string, what: string, name: string, repo: string, folder: string, size: number, partial: number,
 *   present: boolean, found: string[], pinned: boolean, licence: string}} ListedFile
 * @typedef {{state: "running" | "done" | "failed" | "cancelled", files: string[], name: string, phase: string,
 *   done: number, size: number, all_done: number, all_size: number, error: string}} Job
 * @typedef {{files: ListedFile[], missing: string[], missing_size: number, bytes_to_fetch: number,
 *   unpinned: string, restricted: string, free: Record<string, number>, job: Job | null}} Listing
 */

const NODE = "OviWeights";
const ROUTE = "/ovi-native/weights";
const EVENT = "ovi-native.weights";
const MIN_WIDTH = 420;
const HEIGHT = 280;

/** @param {number} bytes @returns {string} */
function human(bytes) {
  for (const [unit, step] of /** @type {[string, number][]} */ ([["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])) {
    if (bytes >= step) return `${(bytes / step).toFixed(bytes < 100 * step ? 1 : 0)} ${unit}`;
  }
  return `${bytes} bytes`;
}

/**
 * An element with text; text never becomes markup.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag @param {string} role @param {string} [text] @param {string} [style]
 * @returns {HTMLElementTagNameMap[K]}
 */
function element(tag, role, text = "", style = "") {
  const made = document.createElement(tag);
  made.dataset.ovi = role;
  made.textContent = text;
  made.style.cssText = style;
  return made;
}

/**
 * Ask the server; a refusal becomes an Error with its sentence.
 * @param {string} path @param {object} [body] sent as JSON with POST; without it the request is a GET
 * @returns {Promise<any>}
 */
async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await api.fetchApi(ROUTE + path, options);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `The server answered ${response.status} ${response.statusText}.`);
  return answer;
}

/** The part of one node that is drawn with HTML. */
class Panel {
  /** @param {any} node */
  constructor(node) {
    this.node = node;
    /** @type {Listing | null} */
    this.listing = null;
    this.asked = 0;
    this.root = element("div", "weights", "", "display:flex; flex-direction:column; gap:6px; height:100%; font-size:12px;"
      + "color:var(--input-text, #ddd); overflow:auto; padding:4px; box-sizing:border-box;");
    this.list = element("ul", "list", "", "margin:0; padding:0; list-style:none; display:grid; gap:3px;");
    this.note = element("div", "note", "", "opacity:0.8;");
    this.status = element("div", "status", "", "white-space:pre-wrap;");
    this.status.setAttribute("role", "status");
    this.bar = element("progress", "progress", "", "width:100%;");
    this.bar.max = 1;
    const buttons = element("div", "buttons", "", "display:flex; gap:6px;");
    const look = "flex:1; padding:4px 8px; cursor:pointer; color:inherit; background:var(--comfy-input-bg, #333);"
      + "border:1px solid var(--border-color, #555); border-radius:4px;";
    this.download = element("button", "download", "Download missing files", look);
    this.cancel = element("button", "cancel", "Cancel", look);
    buttons.append(this.download, this.cancel);
    this.root.append(this.list, this.note, this.status, this.bar, buttons);
    this.download.addEventListener("click", () => this.attempt(() => this.start()));
    this.cancel.addEventListener("click", () => this.attempt(() => ask("/cancel", {})));
    this.showJob(null);
  }

  /** @param {() => Promise<any>} action shows the reason on the node when it fails */
  async attempt(action) {
    try {
      await action();
    } catch (error) {
      this.status.textContent = `⚠ ${error instanceof Error ? error.message : error}`;
    }
  }

  /** @param {string} name @returns {string} */
  widgetValue(name) {
    return String(this.node.widgets?.find((/** @type {any} */ widget) => widget.name === name)?.value ?? "");
  }

  /** @returns {Promise<Listing>} the list for the node's current choice */
  query() {
    const choice = { variant: this.widgetValue("variant"), precision: this.widgetValue("precision") };
    return ask(`?${new URLSearchParams(choice)}`);
  }

  async refresh() {
    const number = ++this.asked;
    const listing = await this.query();
    if (number !== this.asked) return; // the choice has changed since: a later answer counts
    this.listing = listing;
    this.list.replaceChildren(...listing.files.map((file) => {
      const text = file.present
        ? `✔ ${file.what}: ${file.found.join(" + ")} (${file.licence})`
        : `✘ ${file.what}: ${file.name} (${human(file.size)}${file.partial ? `, ${human(file.partial)} of it here` : ""}, ${file.licence})`;
      const row = element("li", file.present ? "present" : "missing", text);
      row.title = file.present ? "Found in ComfyUI's folders"
        : `${file.repo} → ${file.folder}, checked against ${file.pinned ? "a pinned hash" : "the Hub's own hash only"}`;
      return row;
    }));
    this.note.textContent = listing.restricted;
    this.showJob(listing.job);
  }

  /** Ask first, with the sizes, the licences and the folders; only a yes starts the download. */
  async start() {
    const listing = await this.query();
    if (!listing.missing.length) return this.refresh();
    const missing = listing.files.filter((file) => !file.present);
    const free = Object.entries(listing.free).map(([folder, bytes]) => `${folder} (${human(bytes)} free)`);
    const notes = [listing.restricted, listing.unpinned].filter(Boolean);
    const agreed = await app.extensionManager.dialog.confirm({
      title: "Download Ovi weights",
      message: `Download ${missing.length} files, ${human(listing.bytes_to_fetch)} in total, from the Hugging Face Hub?`,
      itemList: [...missing.map((file) => `${file.repo}: ${file.name}, ${human(file.size)}, licence ${file.licence}, into ${file.folder}`), ...free, ...notes],
    });
    if (agreed !== true) return;
    const { job } = await ask("/download", { files: listing.missing });
    this.showJob(job);
  }

  /** @param {Job | null} job */
  showJob(job) {
    const running = job?.state === "running";
    const missing = this.listing?.missing.length ?? 0;
    this.download.disabled = running || missing === 0;
    this.download.style.opacity = this.download.disabled ? "0.5" : "1";
    this.cancel.style.display = running ? "" : "none";
    this.bar.style.display = running ? "" : "none";
    if (job && running) {
      this.bar.value = job.all_size ? Math.min(1, job.all_done / job.all_size) : 0;
      const what = job.phase === "checking" ? "Checking what is here of" : "Downloading";
      this.status.textContent = job.name
        ? `${what} ${job.name}: ${human(job.done)} of ${human(job.size)} (all: ${human(job.all_done)} of ${human(job.all_size)})`
        : "Looking the files up";
    } else if (this.listing && !missing) {
      this.status.textContent = "All files are here.";
    } else if (job?.state === "failed") {
      this.status.textContent = `⚠ ${job.error}`;
    } else if (job?.state === "cancelled") {
      this.status.textContent = "Stopped. What has arrived is kept; the next download goes on from there.";
    } else if (this.listing) {
      const { files, bytes_to_fetch } = this.listing;
      this.status.textContent = `${missing} of ${files.length} files are missing (${human(bytes_to_fetch)} to download).`;
    }
  }
}

app.registerExtension({
  name: "OviNative.Weights",

  /** @param {any} node */
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = new Panel(node);
    const widget = node.addDOMWidget("weights", "ovi_weights", panel.root, {
      serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT,
    });
    widget.serialize = false; // not in saved workflows either
    node.setSize([Math.max(node.size[0], MIN_WIDTH), node.computeSize()[1]]);
    const refresh = () => panel.attempt(() => panel.refresh());

    for (const name of ["variant", "precision"]) {
      const choice = node.widgets?.find((/** @type {any} */ candidate) => candidate.name === name);
      if (!choice) continue;
      const before = choice.callback;
      choice.callback = function (/** @type {any[]} */ ...values) {
        const result = before?.apply(this, values);
        refresh();
        return result;
      };
    }
    /** @param {CustomEvent<Job>} event */
    const onEvent = (event) => {
      if (event.detail.state === "running") {
        panel.showJob(event.detail);
      } else {
        refresh();
        app.refreshComboInNodes?.(); // the loaders' lists of files
      }
    };
    const onExecuted = (/** @type {CustomEvent<any>} */ event) => {
      if (String(event.detail?.node) === String(node.id)) refresh();
    };
    api.addEventListener(EVENT, onEvent);
    api.addEventListener("executed", onExecuted);
    const configure = node.onConfigure;
    node.onConfigure = function (/** @type {any[]} */ ...values) {
      configure?.apply(this, values);
      refresh(); // a loaded workflow has set the widgets without their callbacks
    };
    const removed = node.onRemoved;
    node.onRemoved = function (/** @type {any[]} */ ...values) {
      api.removeEventListener(EVENT, onEvent);
      api.removeEventListener("executed", onExecuted);
      removed?.apply(this, values);
    };
    refresh();
  },
});
