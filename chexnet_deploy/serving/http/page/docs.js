"use strict";

function make(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

async function show() {
  const api = await (await fetch("/openapi.json")).json();
  document.getElementById("about").textContent = api.info.description;
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      const block = document.createElement("details");
      const title = document.createElement("summary");
      title.append(make("code", `${method.toUpperCase()} ${path}`), ` ${route.summary}`);
      block.append(title);
      for (const parameter of route.parameters || []) {
        block.append(make("p", `${parameter.in}: ${parameter.name}. ${parameter.description || ""}`));
      }
      for (const [kind, content] of Object.entries(route.requestBody?.content || {})) {
        block.append(make("p", `Takes ${kind}`), make("pre", JSON.stringify(content.schema, null, 2)));
      }
      const answers = document.createElement("ul");
      for (const [status, answer] of Object.entries(route.responses)) answers.append(make("li", `${status}: ${answer.description}`));
      block.append(answers);
      document.getElementById("paths").append(block);
    }
  }
}

show();
