"""The drag editor as a user's hands and eyes have it."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

from comfyui_server import EXTENSION, Server
from PIL import Image

PATIENCE_MS = 20_000
#: Vue nodes show an extension's editor from 1.32 on, and lay it out without mistakes from about 1.38 on.
PAGES = [("newest", "canvas"), ("newest", "vue"), ("older", "vue"), ("oldest", "canvas")]
#: ComfyUI's own undo history, of the open tab.
HISTORY = "app.extensionManager.workflow.activeWorkflow.changeTracker"
GRAPH: dict[str, Any] = {
    "id": "11111111-1111-4111-8111-111111111111", "version": 0.4, "last_node_id": 3, "last_link_id": 2,
    "nodes": [
        {
            "id": 1, "type": "LoadImage", "pos": [-800, 0], "size": [280, 300], "mode": 0, "flags": {}, "order": 0,
            "inputs": [], "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}], "properties": {},
            "widgets_values": ["wide.png", "image"],
        },
        {
            "id": 2, "type": "RG_DragPoints", "pos": [0, 0], "size": [420, 460], "mode": 0, "flags": {}, "order": 1,
            "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
            "outputs": [
                {"name": "DRAG_POINTS", "type": "DRAG_POINTS", "links": None},
                {"name": "preview", "type": "IMAGE", "links": [2]},
            ],
            "properties": {}, "widgets_values": [""],
        },
        {
            "id": 3, "type": "PreviewImage", "pos": [1100, 0], "size": [280, 300], "mode": 0, "flags": {}, "order": 2,
            "inputs": [{"name": "images", "type": "IMAGE", "link": 2}], "outputs": [], "properties": {},
            "widgets_values": [],
        },
    ],
    "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 1, 3, 0, "IMAGE"]], "groups": [], "config": {}, "extra": {},
}  # fmt: skip


def text(*drags: tuple[float, float, float, float]) -> str:
    """Points as the editor writes them, from (x0, y0, x1, y1)."""
    items = ", ".join(f'{{"from": [{a}, {b}], "to": [{c}, {d}]}}' for a, b, c, d in drags)
    return f'{{"version": 1, "drags": [{items}]}}'


def graph(points: str = text(), picture: str = "wide.png") -> dict[str, Any]:
    """Load Image, Drag Points (node 2), Preview Image."""
    made = copy.deepcopy(GRAPH)
    made["nodes"][0]["widgets_values"][0] = picture
    made["nodes"][1]["widgets_values"][0] = points
    return made


def drags(points: str) -> list[tuple[float, ...]]:
    """(x0, y0, x1, y1) of each arrow of a text, to a hundredth of the picture."""
    return [tuple(round(v, 2) for v in (*drag["from"], *drag["to"])) for drag in json.loads(points)["drags"]]


class Editor:
    def __init__(self, server: Server, page: Any, renderer: str) -> None:
        self.server, self.page, self.renderer = server, page, renderer
        self.node = 2
        self.errors: list[str] = []
        self.left = False
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.errors.append(error.stack or str(error)))
        page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))

    # The page

    def open_page(self) -> None:
        self.page.goto(self.server.url)
        self.until("window.app?.graph && app.extensionManager && app.canvas && document.querySelector('#graph-canvas')")
        self.until("app.extensionManager.workflow?.activeWorkflow?.changeTracker && app.graph.nodes.length >= 0")
        # What will go from the page is an error here, whenever it is the extension that uses it.
        self.page.evaluate(
            """extension => {
                LiteGraph.alwaysRepeatWarnings = true;
                LiteGraph.onDeprecationWarning = [said => {
                    const { stack } = new Error(said);
                    if (stack.includes(extension)) console.error(stack);
                }];
            }""",
            EXTENSION,
        )

    def load(
        self,
        points: str = text(),
        picture: str = "wide.png",
        workflow: dict[str, Any] | None = None,
        look: bool = True,
        node: int = 2,
    ) -> None:
        """Open a workflow in the page, the editor of a node in view at 100%, and wait for its picture."""
        self.node = node
        opened = workflow or graph(points, picture)
        # As saved by this renderer: some versions lay a workflow of the other one out anew, and go on doing so.
        opened["extra"] = {"workflowRendererVersion": {"vue": "Vue", "canvas": "LG"}[self.renderer]}
        self.page.evaluate(
            """async workflow => {
                const tab = app.extensionManager.workflow.activeWorkflow, frame = () => new Promise(requestAnimationFrame);
                app.nodeOutputs = tab.changeTracker.nodeOutputs = {}; // what ran in the last workflow
                await app.loadGraphData({ ...workflow, nodes: [], links: [] }, true, true, tab);
                for (let i = 0; i < 3; i++) await frame(); // or Vue nodes stay where the last workflow had them
                await app.loadGraphData(workflow, true, true, tab);
            }""",
            opened,
        )
        if look:
            self.look()
        if workflow is None:
            self.until("[...document.querySelectorAll('.rg-drag-stage img')].some(i => !i.hidden && i.naturalWidth)")
        # What the page itself fills in when it loads a workflow is no step of the user's.
        self.page.evaluate(
            f"""() => {{
                const changes = {HISTORY};
                changes.captureCanvasState ? changes.captureCanvasState() : changes.checkState();
                changes.undoQueue.length = changes.redoQueue.length = 0;
            }}"""
        )

    def look(self, zoom: float = 1.0, node: int | None = None) -> None:
        """Bring a node into view: the editor's own if no other is named."""
        self.page.evaluate(
            """([zoom, id]) => {
                const { ds } = app.canvas, [x, y] = app.canvas.graph.getNodeById(id).pos;
                ds.scale = zoom; ds.offset[0] = 350 / zoom - x; ds.offset[1] = 150 / zoom - y;
                app.canvas.setDirty(true, true);
            }""",
            [zoom, node or self.node],
        )
        self.page.wait_for_selector(".rg-drag-stage", state="visible")
        self.still()

    def still(self) -> None:
        """Wait until the editor stays where it is on the screen and takes presses (while Vue nodes move, none does)."""
        self.page.evaluate(
            """async () => {
                let over = '';
                const stage = () => document.querySelector('.rg-drag-stage'), frame = () => new
                Promise(requestAnimationFrame); const place = () => {
                    const { x, y, width, height } = stage().getBoundingClientRect();
                    const hit = document.elementFromPoint(x + width / 2, Math.min(y + height / 2, innerHeight - 200));
                    over = hit?.outerHTML.slice(0, 200);
                    return stage().contains(hit) && JSON.stringify([x, y, width, height]);
                };
                for (let same = 0, before = null, frames = 0; same < 6; await frame()) {
                    same = before && place() === before ? same + 1 : 0;
                    before = place();
                    if (frames++ > 600) throw Error(`the editor is under ${over}`);
                }
            }"""
        )

    def until(self, expression: str) -> None:
        self.page.wait_for_function(expression)

    # Eyes

    @property
    def points(self) -> str:
        """The widget's value."""
        widget = f"app.canvas.graph.getNodeById({self.node}).widgets.find(w => w.name === 'points')"
        return self.page.evaluate(f"{widget}.value")

    @property
    def drags(self) -> list[tuple[float, ...]]:
        """(x0, y0, x1, y1) of each arrow, to a hundredth of the picture."""
        return drags(self.points)

    @property
    def drags_to_run(self) -> list[list[tuple[float, ...]]]:
        """The arrows of every Drag Points node as the page would send them to the server now."""
        prompt = json.loads(self.page.evaluate("app.graphToPrompt().then(({ output }) => JSON.stringify(output))"))
        return [drags(node["inputs"]["points"]) for node in prompt.values() if node["class_type"] == "RG_DragPoints"]

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """The finished runs by their ids, the oldest first."""
        return self.server.json("/history")

    @property
    def said(self) -> str:
        return self.page.locator(".rg-drag [role=status]").filter(visible=True).first.inner_text()

    @property
    def steps(self) -> int:
        return self.page.evaluate(f"{HISTORY}.undoQueue.length")

    @property
    def saved(self) -> dict[str, Any]:
        """The workflow as it is saved."""
        return self.page.evaluate("(app.rootGraph ?? app.graph).serialize()")

    def colour_in_preview(self, x: float, y: float) -> tuple[int, ...]:
        """What Preview Image got from a run, at a point of the picture."""
        self.until("app.nodeOutputs[3]?.images")
        name = self.page.evaluate("app.nodeOutputs[3].images[0].filename")
        _, content = self.server.request(f"/view?filename={name}&type=temp")
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        return picture.getpixel((round(x * picture.width), round(y * picture.height)))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the picture is on the screen."""
        box = self.page.locator(".rg-drag-stage img").filter(visible=True).first.bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    # Hands

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def click(self, x: float, y: float, **options: Any) -> None:
        self.page.mouse.click(*self.place(x, y), **options)

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        mouse = self.page.mouse
        mouse.move(*self.place(x0, y0))
        mouse.down()
        mouse.move(*self.place((x0 + x1) / 2, (y0 + y1) / 2))
        mouse.move(*self.place(x1, y1))
        mouse.up()

    def touch(self, *path: tuple[float, float], cancelled: bool = False) -> None:
        """One finger along points of the picture; ``cancelled``: at the end the system takes the touch away."""
        self.fingers(*([self.place(*at)] for at in path), [], cancelled=cancelled)

    def fingers(self, *moments: list[tuple[float, float]], cancelled: bool = False) -> None:
        """Where on the screen fingers are, moment by moment."""
        session, before = self.page.context.new_cdp_session(self.page), 0
        for at in moments:
            kind = "touchStart" if len(at) > before else "touchMove" if len(at) == before else "touchEnd"
            points = [{"id": i, "x": x, "y": y} for i, (x, y) in enumerate(at)]
            kind = "touchCancel" if cancelled and not at else kind
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
            before = len(at)
        session.detach()

    def pen(self, *path: tuple[float, float]) -> None:
        """A pen that presses harder along points of the picture."""
        session = self.page.context.new_cdp_session(self.page)
        kinds = ["mousePressed"] + ["mouseMoved"] * (len(path) - 1) + ["mouseReleased"]
        for i, (kind, at) in enumerate(zip(kinds, [*path, path[-1]], strict=True)):
            x, y = self.place(*at)
            held = {"button": "left", "buttons": 1, "clickCount": 1, "force": (i + 1) / len(kinds), "tiltX": 30}
            session.send("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, "pointerType": "pen", **held})
        session.detach()

    def run(self) -> dict[str, Any]:
        """Run the workflow with ComfyUI's own key; what the server's history has of it when it is done."""
        before = self.runs
        self.press("Control+Enter")
        new = self.server.wait(lambda: [run for key, run in self.runs.items() if key not in before], "the run's end")
        assert new[0]["status"]["status_str"] == "success", new[0]["status"]["messages"]
        return new[0]

    def graph_step(self, keys: str) -> None:
        """ComfyUI's own undo or redo, to its end: it loads the workflow anew."""
        before = self.steps
        self.press(keys)
        self.until(f"{HISTORY}.undoQueue.length !== {before} && !{HISTORY}._restoringState")
        self.still()
        # In some versions Vue nodes then measure themselves anew, and the page takes that for a step of the user's.
        self.page.evaluate(f"{HISTORY}.activeState = JSON.parse(JSON.stringify((app.rootGraph ?? app.graph).serialize()))")

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True).first

    def leave(self) -> None:
        """Give the keys back to the graph: a click on its ground, never twice at one place."""
        self.left = not self.left
        self.page.mouse.click(200, 720 if self.left else 800)
