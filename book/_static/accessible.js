// What screen readers and keyboards need and the theme leaves out.
function mend() {
    // A button is called what is written on it.
    for (const button of document.querySelectorAll("button[aria-label], summary[aria-label]")) {
        if (button.textContent.trim()) button.removeAttribute("aria-label");
    }
    // What scrolls can be reached, and so scrolled, with the keyboard.
    for (const box of document.querySelectorAll(".bd-article :is(table, pre, .cell_output, .math, figure)")) {
        const larger = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
        const scrolls = larger && getComputedStyle(box).overflowX !== "visible";
        if (scrolls && !box.querySelector("a:not(.headerlink), button, input, [tabindex]")) box.tabIndex = 0;
        box.classList.toggle("scrolls", scrolls && box.scrollWidth > box.clientWidth + 8);
    }
    // A slider is called what stands before it.
    for (const slider of document.querySelectorAll(".widget-hslider")) {
        const label = slider.querySelector(".widget-label");
        slider.querySelector("[role=slider]")?.setAttribute("aria-label", label?.innerText.trim() || "value");
    }
    // Links between citations are no items of their list.
    document.querySelectorAll(".citation-list[role=list]").forEach((list) => list.removeAttribute("role"));
}
window.addEventListener("load", () => {
    mend();
    let waiting; // widgets are drawn later, one after another
    new MutationObserver(() => {
        clearTimeout(waiting);
        waiting = setTimeout(mend, 200);
    }).observe(document.querySelector("main") ?? document.body, { childList: true, subtree: true });
});
