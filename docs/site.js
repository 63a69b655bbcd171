// What scrolls sideways can be scrolled by keyboard, also where the theme takes it out of reach again; and the place of a block's copy
// button is no landmark.
const reachable = ".md-typeset__scrollwrap, .md-typeset pre > code";
const mend = () => {
  document.querySelectorAll(reachable).forEach((each) => each.tabIndex === 0 || (each.tabIndex = 0));
  document.querySelectorAll(".md-code__nav").forEach((each) => each.setAttribute("role", "none"));
};
new MutationObserver(mend).observe(document.body, { attributeFilter: ["tabindex"], childList: true, subtree: true });
mend();
