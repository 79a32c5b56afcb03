// The widget manager speaks to MathJax 2; these pages carry MathJax 3.
window.addEventListener("load", () => {
    if (window.MathJax) {
        MathJax.Hub = { Queue: ([, , element]) => MathJax.typesetPromise([element]) };
    }
});
