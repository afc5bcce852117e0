// Shows a text as it is, whatever signs it holds.
function show() {
  element.querySelector("p").textContent = props.value;
}

watch("value", show);
show();
