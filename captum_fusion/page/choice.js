// Buttons with what they stand for: sample photographs, or classes with their probabilities.
function made(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function sample(each, index) {
  const button = made("button", "sample");
  const image = made("img");
  image.src = each.picture;
  image.alt = each.caption;
  button.title = each.caption;
  button.append(image);
  button.addEventListener("click", () => trigger("choose", { index }));
  return button;
}

function bar(each) {
  const row = made("div", each.chosen ? "bar chosen" : "bar");
  const button = made("button", "name");
  button.setAttribute("aria-pressed", each.chosen);
  button.title = `Explain ${each.name}`;
  const share = made("span", "share");
  share.style.width = `${100 * each.probability}%`;
  button.append(share, made("span", "text", each.name), made("span", "number", `${(100 * each.probability).toFixed(1)} %`));
  button.addEventListener("click", () => trigger("choose", { index: each.index }));
  const beside = made("button", "beside", each.chosen ? "−" : "+");
  beside.title = each.chosen ? `Leave ${each.name} out` : `Explain ${each.name} beside the other class`;
  beside.setAttribute("aria-label", beside.title);
  beside.addEventListener("click", () => trigger("beside", { index: each.index }));
  row.append(button, beside);
  return row;
}

function show() {
  const { samples, classes } = JSON.parse(props.value);
  element.querySelector(".choices").replaceChildren(...(samples ? samples.map(sample) : classes.map(bar)));
}

watch("value", show);
show();
