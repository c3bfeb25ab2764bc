/** The editor's style sheet, in ComfyUI's colours. */

const ID = "rg-drag-style";
const CSS = `
.rg-drag { display: flex; flex-direction: column; gap: 4px; box-sizing: border-box; width: 100%; height: 100%; min-height: 300px;
  font: 12px/1.3 system-ui, sans-serif; color: var(--input-text, #ddd); user-select: none; -webkit-user-select: none; }
.rg-drag-stage { position: relative; flex: 1 1 0; min-height: 0; overflow: hidden; box-sizing: border-box; cursor: crosshair;
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 6px; touch-action: none; -webkit-touch-callout: none;
  background: var(--comfy-input-bg, #222) repeating-conic-gradient(rgba(128, 128, 128, 0.12) 0% 25%, transparent 0% 50%) 0 0 / 16px 16px; }
.rg-drag-stage:focus-within { border-color: #409cff; }
.rg-drag-stage:has(:focus-visible) { outline: 2px solid #409cff; }
.rg-drag-stage img { position: absolute; max-width: none; pointer-events: none; }
.rg-drag-arrows { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none; }
.rg-drag-pad { position: absolute; inset: 0; opacity: 0; pointer-events: none; border: 0; padding: 0; }
.rg-drag-note { position: absolute; inset: auto 12px 12px; text-align: center; pointer-events: none; color: var(--descrip-text, #999); }
.rg-drag-note.rg-drag-error { color: var(--error-text, #ff6b6b); font-weight: 600; }
.rg-drag-bar { display: flex; align-items: center; gap: 2px; flex: none; }
.rg-drag-bar button { display: inline-flex; align-items: center; justify-content: center; width: 28px; height: 26px; padding: 0;
  border: 0; border-radius: 5px; background: transparent; color: inherit; cursor: pointer; }
.rg-drag-bar button:hover { background: var(--comfy-input-bg, #333); }
.rg-drag-bar button:focus-visible { outline: 2px solid #409cff; }
.rg-drag-bar button[aria-disabled="true"] { opacity: 0.35; cursor: default; background: transparent; }
.rg-drag-bar svg { width: 16px; height: 16px; fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linecap: round; stroke-linejoin: round; }
.rg-drag-status { flex: 1; min-width: 0; max-height: 26px; overflow: hidden; line-height: 13px; text-wrap: balance; text-align: right;
  color: var(--descrip-text, #999); font-variant-numeric: tabular-nums; }
.rg-drag-linked .rg-drag-stage { opacity: 0.5; cursor: default; }
`;

export function addStyle() {
  if (document.getElementById(ID)) return;
  const style = document.createElement("style");
  style.id = ID;
  style.textContent = CSS;
  document.head.append(style);
}
