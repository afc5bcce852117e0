// Shows the status as plain text, and says when the server no longer answers.
const alive = () => fetch(location.href, { method: "HEAD", cache: "no-store" });

function show() {
  element.querySelector("p").textContent = props.value;
}

watch("value", show);
show();
setInterval(async () => {
  try {
    await alive();
  } catch {
    element.querySelector("p").textContent = "The server has ended. Start it again, then reload this page.";
  }
}, 3000);
