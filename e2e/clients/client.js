// client.js asks for one token by @azure/identity, exactly as an application that knows nothing of Pod Identity does,
// and prints how it went as one JSON line, of the same form as goclient's. NODE_PATH says which version of the library.
//
//   node client.js managed|default [--resource URI] [--client-id ID | --object-id ID | --resource-id ID] [--chain]
"use strict";

const { ChainedTokenCredential, DefaultAzureCredential, ManagedIdentityCredential } = require("@azure/identity");

// What the library asks and receives is noted where Node itself tells it, so that the library's own pipeline is as it
// is. It is said on standard error: whoever tests how a client waits has to know that it does.
const answers = [];
const { channel } = require("diagnostics_channel");
channel("http.client.request.start").subscribe(() => console.error("asking"));
channel("http.client.response.finish").subscribe(({ response }) => {
  answers.push(response.statusCode);
  console.error("answer", response.statusCode);
});

const [kind, ...rest] = process.argv.slice(2);
const options = { resource: "https://vault.azure.net" };
while (rest.length > 0) {
  const name = rest.shift().replace(/^--/, "");
  options[name] = name === "chain" ? true : rest.shift();
}

function credential() {
  if (kind === "default") return new DefaultAzureCredential();
  if (options["client-id"]) return new ManagedIdentityCredential({ clientId: options["client-id"] });
  if (options["object-id"]) return new ManagedIdentityCredential({ objectId: options["object-id"] });
  if (options["resource-id"]) return new ManagedIdentityCredential({ resourceId: options["resource-id"] });
  return new ManagedIdentityCredential();
}

const next = { getToken: async () => ({ token: "of the next credential", expiresOnTimestamp: Date.now() + 3600e3 }) };

async function main() {
  const start = process.hrtime.bigint();
  const result = {};
  try {
    const asked = options.chain ? new ChainedTokenCredential(credential(), next) : credential();
    const got = await asked.getToken(options.resource + "/.default");
    Object.assign(result, { ok: true, token: got.token, expires_on: Math.floor(got.expiresOnTimestamp / 1000) });
  } catch (e) {
    Object.assign(result, { ok: false, kind: e.name, error: e.message });
  }
  result.answers = answers;
  result.duration_ms = Number(process.hrtime.bigint() - start) / 1e6;
  console.log(JSON.stringify(result));
}

main();
