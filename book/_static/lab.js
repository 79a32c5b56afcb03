// The lab: paint on a picture and see what the models of the book make of it. Everything is computed in this page.
"use strict";
(() => {
const FORMAT = 1; // of the scripts that book/lab.py writes
const MOST_UNDONE = 40; // strokes
const SLOW = 120; // ms: a model that takes longer waits until the stroke ends
const BRUSHES = { // px of the picture, share of the brightness that is covered, and how the edge is
    scratch: { size: 3, cover: 1, soft: false },
    stain: { size: 28, cover: 0.6, soft: true },
    hole: { size: 14, cover: 1, soft: false },
};
const here = new URL(".", document.currentScript.src); // so that the book may lie anywhere
const root = document.getElementById("lab");
const reader = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

// --- scripts with data, since a page that was opened from a file may load nothing else ---

window.labFile = (file) => { document.currentScript.file = file; };

async function load(address) {
    const script = Object.assign(document.createElement("script"), { src: new URL(address, here) });
    await new Promise((done, failed) => {
        script.onload = done;
        script.onerror = () => failed(new Error(`${address} is missing. "make book" makes it.`));
        document.head.append(script);
    });
    script.remove();
    if (script.file?.format !== FORMAT) {
        throw new Error(`${address} has format ${script.file?.format}; this page reads format ${FORMAT}. Build the book again.`);
    }
    return script.file;
}

async function unpacked([length, text]) { // gzip, 15 bits in each character from U+3000 on -> bytes
    const packed = new Uint8Array(length);
    let held = 0, bits = 0, at = 0; // bits that are still to be written
    for (let i = 0; i < text.length; i++) {
        held = held << 15 | text.charCodeAt(i) - 0x3000;
        for (bits += 15; bits >= 8 && at < length; at++) {
            bits -= 8;
            packed[at] = held >> bits;
            held &= (1 << bits) - 1;
        }
    }
    return new Uint8Array(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
}

let runtime; // a promise, so that it is loaded once
function ready(address) {
    return runtime ??= (async () => {
        const { parts } = await load(address);
        const [code, wasmBinary] = await Promise.all([unpacked(parts.code), unpacked(parts.wasm)]);
        const ort = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
        Object.assign(ort.env.wasm, { wasmBinary, numThreads: 1 });
        return ort;
    })().catch((error) => {
        runtime = undefined; // another click tries again
        throw error;
    });
}

// --- elements ---

function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        if (name in element && name !== "list") element[name] = value;
        else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
}
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const nextFrame = () => new Promise((done) => setTimeout(done, 0));

function show(canvas, side, colourAt) { // colourAt(i) -> [red, green, blue] of pixel i
    canvas.width = canvas.height = side;
    const image = new ImageData(side, side);
    for (let i = 0; i < side * side; i++) image.data.set([...colourAt(i), 255], 4 * i);
    canvas.getContext("2d").putImageData(image, 0, 0);
}

// --- the picture, and painting on it ---

class Picture {
    constructor(side, changed) {
        Object.assign(this, { side, changed, pixels: new Uint8Array(3 * side * side), before: [], painting: false });
        this.cursor = [side / 2, side / 2];
        this.stroke = new Float32Array(side * side); // how much of each pixel the last stroke covers
    }

    replace(pixels) {
        this.pixels = Uint8Array.from(pixels);
        this.original = this.pixels;
        this.before = [];
        this.stroke.fill(0);
        this.changed();
    }

    begin(x, y, brush) {
        this.before = [...this.before.slice(1 - MOST_UNDONE), this.pixels];
        this.stroke = new Float32Array(this.side ** 2);
        this.painting = true;
        this.brush = brush;
        this.cursor = [x, y];
        this.line(x, y);
    }

    line(x, y) { // from the cursor
        const [fromX, fromY] = this.cursor;
        const steps = Math.max(1, Math.ceil(Math.hypot(x - fromX, y - fromY)));
        for (let k = 0; k <= steps; k++) this.dab(fromX + (x - fromX) * k / steps, fromY + (y - fromY) * k / steps);
        this.cursor = [x, y];
        // A stroke covers what was there before it, so that it is even however slowly it is drawn.
        const under = this.before.at(-1), grey = this.brush.brightness;
        this.pixels = under.map((value, i) => {
            const cover = this.stroke[Math.trunc(i / 3)];
            return cover ? Math.round(value + (grey - value) * cover) : value;
        });
        this.changed();
    }

    dab(x, y) {
        const { side, stroke, brush } = this, radius = brush.size / 2;
        for (let row = Math.max(0, Math.floor(y - radius - 1)); row <= Math.min(side - 1, y + radius + 1); row++) {
            for (let column = Math.max(0, Math.floor(x - radius - 1)); column <= Math.min(side - 1, x + radius + 1); column++) {
                const distance = Math.hypot(column + 0.5 - x, row + 0.5 - y);
                const edge = brush.soft ? (1 - distance / radius) * 2 : radius + 0.5 - distance;
                const i = row * side + column;
                stroke[i] = Math.max(stroke[i], brush.cover * Math.min(1, Math.max(0, edge)));
            }
        }
    }

    end() {
        if (!this.painting) return;
        this.painting = false;
        this.changed();
    }

    undo() {
        if (!this.before.length) return;
        this.pixels = this.before.pop();
        this.changed();
    }

    restart() {
        if (this.before.length) this.replace(this.original);
    }
}

// --- a method ---

class Method {
    constructor(about, index) {
        Object.assign(this, about, { index, session: null, took: 0 });
        this.button = make("button", { type: "button", className: "lab-load", onclick: () => this.start() });
        this.status = make("p", { className: "lab-status", role: "status" });
        this.redrawn = make("canvas", { width: 1, height: 1, role: "img", ariaLabel: `What ${about.name} draws again` });
        this.heat = make("canvas", { width: 1, height: 1, role: "img", ariaLabel: `Anomaly map of ${about.name}` });
        this.pictures = make("div", { className: "lab-maps", hidden: true },
            ...(about.redraws ? [make("figure", {}, this.redrawn, make("figcaption", {}, "drawn again"))] : []),
            make("figure", {}, this.heat, make("figcaption", {}, "anomaly map")));
        this.histogram = make("div", { className: "lab-histogram" });
        this.element = make("section", { className: "lab-method", ariaLabel: about.title },
            make("h3", {}, about.title), make("p", {}, about.sentence),
            this.button, this.status, this.pictures, this.histogram);
        this.describe();
        this.draw();
    }

    describe() {
        const more = runtime ? "" : ` and the runtime, ${megabytes(this.index.runtime.bytes)}, once`;
        this.button.textContent = `Load ${this.name}: ${megabytes(this.bytes)}${more}`;
    }

    async start() {
        this.button.disabled = true;
        try {
            const needed = runtime ? "" : " and the runtime";
            this.status.textContent = `Loading ${this.name}${needed} …`;
            const starting = ready(this.index.runtime.file);
            this.index.methods.forEach((other) => other.describe());
            const [ort, { parts }] = await Promise.all([starting, load(this.file)]);
            this.status.textContent = "Unpacking and starting …";
            await nextFrame();
            this.ort = ort;
            this.session = await ort.InferenceSession.create(await unpacked(parts.model), {
                logSeverityLevel: 3, // errors: it warns of constants that it computes later
                extra: { session: { disable_quant_qdq: "1" } }, // weights become float32 once, not in every run
            });
            this.button.hidden = true;
            this.pictures.hidden = false;
            this.index.changed();
        } catch (error) {
            this.button.disabled = false;
            this.index.methods.forEach((other) => other.describe());
            this.status.textContent = `This did not work: ${error.message}`;
        }
    }

    async look(picture) {
        const { side, pixels } = picture, began = performance.now();
        const image = new this.ort.Tensor("uint8", pixels, [1, side, side, 3]);
        const { score, map, reconstruction } = await this.session.run({ image });
        this.took = performance.now() - began;
        this.seen = pixels;
        this.score = score.data[0];
        this.map = map.data;
        if (!Number.isFinite(this.score)) throw new Error("the score is not a number.");
        const S = map.dims[1], [low, high] = this.range, colours = this.index.colours;
        show(this.heat, S, (i) => colours[Math.round(255 * Math.min(1, Math.max(0, (this.map[i] - low) / (high - low))))]);
        if (reconstruction) {
            show(this.redrawn, S, (i) => [0, 1, 2].map((c) => 255 * reconstruction.data[c * S * S + i]));
        }
        const verdict = this.score > this.threshold ? "defective" : "good";
        this.status.replaceChildren(make("strong", { className: `lab-${verdict}` }, verdict),
            `: score ${reader.format(this.score)}, threshold ${reader.format(this.threshold)}`);
        this.draw();
    }

    draw() { // good scores above the axis, defective ones below, so that colour alone says nothing
        const all = [...this.good, ...this.defective], bins = 24, width = 320, height = 114, middle = 52;
        const lowest = Math.min(...all), highest = Math.max(...all), step = (highest - lowest) / bins;
        const x = (value) => 10 + 300 * Math.min(1, Math.max(0, (value - lowest) / (highest - lowest)));
        const counts = (scores) => scores.reduce((found, value) => {
            found[Math.min(bins - 1, Math.floor((value - lowest) / step))] += 1;
            return found;
        }, Array(bins).fill(0));
        const [good, defective] = [counts(this.good), counts(this.defective)];
        const unit = 38 / Math.max(...good, ...defective);
        const bars = (found, name, up) => found.map((n, k) => n && `<rect class="lab-${name}" x="${10 + 300 * k / bins + 0.5}"
            y="${up ? middle - n * unit : middle}" width="${300 / bins - 1}" height="${n * unit}"/>`).filter(Boolean).join("");
        const limit = x(this.threshold), yours = x(this.score), beyond = this.score > highest ? " (off the scale)" : "";
        const side = (at) => at > 160 ? "end" : "start";
        this.histogram.innerHTML = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="Scores of
            ${this.good.length} good and ${this.defective.length} defective test pictures, threshold
            ${reader.format(this.threshold)}${this.session ? `, your picture ${reader.format(this.score)}` : ""}">
            ${bars(good, "good", true)}${bars(defective, "defective", false)}
            <path d="M10 ${middle}H310" class="lab-axis"/>
            <path d="M${limit} 6V${height - 22}" class="lab-threshold"/>
            <text x="${limit + (limit > 160 ? -4 : 4)}" y="12" text-anchor="${side(limit)}">threshold</text>
            ${this.map ? `<path d="M${yours} ${middle}l-6 46h12z" class="lab-yours"/>
            <text x="${yours}" y="${height - 8}" text-anchor="${yours > 220 ? "end" : yours < 100 ? "start" : "middle"}">
            your picture${beyond}</text>` : ""}</svg><p class="lab-legend"><span class="lab-good">■</span>
            ${this.good.length} good test pictures, above <span class="lab-defective">■</span>
            ${this.defective.length} defective ones, below</p>`;
    }
}

// --- the page ---

function controls(picture, index, images) {
    const range = (text, unit, attributes) => {
        const input = make("input", { type: "range", ...attributes }), value = make("output", {}, String(input.value));
        input.oninput = () => { value.textContent = input.value; };
        return [input, make("label", {}, `${text}: `, value, unit, input)];
    };
    const [size, sizeLabel] = range("Size", " px", { min: 1, max: 64, value: BRUSHES.scratch.size });
    const [brightness, brightnessLabel] = range("Brightness", " of 255", { min: 0, max: 255, value: 30 });
    let kind = "scratch";
    const brushes = Object.keys(BRUSHES).map((name) => make("label", {}, make("input", {
        type: "radio", name: "lab-brush", value: name, checked: name === kind,
        onchange: () => {
            kind = name;
            size.value = BRUSHES[name].size;
            size.oninput();
        },
    }), ` ${name}`));
    const brush = () => ({ ...BRUSHES[kind], size: Number(size.value), brightness: Number(brightness.value) });
    const chosen = make("select", { onchange: () => picture.replace(images[chosen.value]) },
        ...Object.keys(images).map((name) => make("option", { value: name }, name)));
    const own = make("input", { type: "file", accept: "image/*", onchange: () => own.files[0] && open(own.files[0], picture) });
    const undo = make("button", { type: "button", onclick: () => picture.undo() }, "Undo");
    const restart = make("button", { type: "button", onclick: () => picture.restart() }, "Start again");
    const element = make("div", { className: "lab-controls" },
        make("label", {}, "Picture ", chosen),
        make("fieldset", {}, make("legend", {}, "Brush"), ...brushes),
        sizeLabel, brightnessLabel,
        make("div", { className: "lab-buttons" }, undo, restart),
        make("label", {}, "Or a picture of your own: choose it, or drop it on the gear. It stays in your browser. ", own));
    return { element, brush };
}

async function open(file, picture) { // the middle square of an image file
    const { side } = picture, message = root.querySelector(".lab-message");
    try {
        const bitmap = await createImageBitmap(file), short = Math.min(bitmap.width, bitmap.height);
        const context = make("canvas", { width: side, height: side }).getContext("2d");
        context.imageSmoothingQuality = "high";
        context.drawImage(bitmap, (bitmap.width - short) / 2, (bitmap.height - short) / 2, short, short, 0, 0, side, side);
        picture.replace(context.getImageData(0, 0, side, side).data.filter((_, i) => i % 4 !== 3));
        message.textContent = "";
    } catch {
        message.textContent = `${file.name} is no image that this browser can read.`;
    }
}

function paintable(canvas, ring, picture, brush) {
    const place = (event) => {
        const box = canvas.getBoundingClientRect();
        return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((share) => share * picture.side);
    };
    const move = (x, y) => { // the ring shows the size of the brush
        const share = 100 / picture.side, { size } = brush();
        Object.assign(ring.style, { left: `${x * share}%`, top: `${y * share}%`, width: `${size * share}%`, height: `${size * share}%` });
    };
    canvas.onpointerdown = (event) => {
        if (event.button) return;
        canvas.setPointerCapture(event.pointerId);
        picture.begin(...place(event), brush());
    };
    canvas.onpointermove = (event) => {
        const at = place(event);
        if (picture.painting) for (const part of event.getCoalescedEvents?.() ?? []) picture.line(...place(part));
        if (picture.painting) picture.line(...at);
        else picture.cursor = at;
        move(...at);
    };
    canvas.onpointerup = canvas.onpointercancel = () => picture.end();
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    canvas.onkeydown = (event) => {
        const step = arrows[event.key], far = event.ctrlKey ? 1 : 4;
        if (step) {
            const at = picture.cursor.map((value, k) => Math.min(picture.side, Math.max(0, value + far * step[k])));
            if (event.shiftKey) {
                if (!picture.painting) picture.begin(...picture.cursor, brush());
                picture.line(...at);
            }
            picture.cursor = at;
            move(...at);
        } else if (event.key === " ") {
            picture.begin(...picture.cursor, brush());
            picture.end();
        } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) picture.undo();
        else return;
        event.preventDefault();
    };
    canvas.onkeyup = (event) => { if (event.key === "Shift") picture.end(); };
    canvas.onblur = () => picture.end();
    canvas.onfocus = () => move(...picture.cursor);
}

async function start() {
    const index = await load("lab/index.js");
    const names = Object.keys(index.parts), side = index.side;
    const raw = await Promise.all(names.map((name) => unpacked(index.parts[name])));
    const images = Object.fromEntries(names.map((name, k) => [name, raw[k]]));
    const canvas = make("canvas", { width: side, height: side, tabIndex: 0, role: "application", ariaLabel:
        "The picture. Arrow keys move the brush, space paints a spot, shift with an arrow key paints a line, control and Z undo." });
    const ring = make("span", { className: "lab-ring", ariaHidden: "true" });

    let busy = false, wanted = false;
    const look = async () => { // the newest picture; those between are passed over
        wanted = true;
        if (busy) return;
        busy = true;
        while (wanted) {
            wanted = false;
            for (const method of index.methods.filter((m) => m.session && !(picture.painting && m.took > SLOW))) {
                try {
                    await method.look(picture);
                } catch (error) {
                    method.status.textContent = `This did not work: ${error.message}`;
                }
                await nextFrame();
            }
        }
        busy = false;
    };
    index.changed = () => {
        show(canvas, side, (i) => picture.pixels.subarray(3 * i, 3 * i + 3));
        look();
    };
    const picture = new Picture(side, index.changed);
    index.methods = index.methods.map((about) => new Method(about, index));
    const { element, brush } = controls(picture, index, images);
    paintable(canvas, ring, picture, brush);
    const board = make("div", { className: "lab-canvas" }, canvas, ring);
    board.ondragover = (event) => event.preventDefault();
    board.ondrop = (event) => {
        event.preventDefault();
        if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0], picture);
    };
    root.replaceChildren(
        make("div", { className: "lab-board" }, board, element),
        make("p", { className: "lab-message", role: "alert" }),
        make("div", { className: "lab-methods" }, ...index.methods.map((method) => method.element)));
    root.lab = { picture, methods: index.methods }; // to look at from the console, and for the check of the page
    picture.replace(images[names[0]]);
}

start().catch((error) => {
    root.replaceChildren(make("p", { className: "lab-message", role: "alert" }, `The lab did not start: ${error.message}`));
});
})();
