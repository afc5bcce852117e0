// Hands a file that the page has made to the browser.
watch("value", () => {
  const { name, address } = JSON.parse(props.value);
  const link = document.createElement("a");
  link.download = name;
  link.href = address;
  link.click();
});
