// Loaded before the widget manager, which looks for its icon fonts beside the page and speaks to MathJax 2.
const vendored = new URL(document.documentElement.dataset.content_root + "_static/vendor/html-manager", location).href;
window.require = { paths: { "@jupyter-widgets": vendored, "@jupyter-widgets/html-manager/dist": vendored } };
window.addEventListener("load", () => {
    if (window.MathJax) {
        MathJax.Hub = { Queue: ([, , element]) => MathJax.typesetPromise([element]) };
    }
});
