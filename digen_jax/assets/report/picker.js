for (const box of document.querySelectorAll(".picker")) {
  const panels = box.querySelectorAll(".panel");
  const range = box.querySelector("input");
  if (!range) continue;
  const show = (wanted) => {
    const chosen = Math.max(0, Math.min(panels.length - 1, wanted));
    panels.forEach((panel, i) => { panel.hidden = i !== chosen; });
    range.value = chosen;
    box.querySelector("output").textContent = panels[chosen].dataset.name;
  };
  range.addEventListener("input", () => show(Number(range.value)));
  box.querySelectorAll("button").forEach((button, i) => {
    button.addEventListener("click", () => show(Number(range.value) + 2 * i - 1));
  });
  show(Number(range.value));
}
