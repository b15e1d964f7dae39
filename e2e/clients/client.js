// client.js requests one token with @azure/identity, like an application that knows nothing of Pod Identity, and prints
// the result as one JSON line in the format of goclient. NODE_PATH selects the version of the library.
//
//   node client.js managed|default [--resource URI] [--client-id ID | --object-id ID | --resource-id ID] [--chain] [--wait]
"use strict";

const { ChainedTokenCredential, DefaultAzureCredential, ManagedIdentityCredential } = require("@azure/identity");

// Node's diagnostics channels report requests and responses without a change to the library's pipeline. Both are
// written to standard error, so that a test knows when the client waits for a response.
const statuses = [];
const { channel } = require("diagnostics_channel");
channel("http.client.request.start").subscribe(() => console.error("request"));
channel("http.client.response.finish").subscribe(({ response }) => {
  statuses.push(response.statusCode);
  console.error("response", response.statusCode);
});

const [kind, ...rest] = process.argv.slice(2);
const options = { resource: "https://vault.azure.net" };
while (rest.length > 0) {
  const name = rest.shift().replace(/^--/, "");
  options[name] = name === "chain" || name === "wait" ? true : rest.shift();
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
  if (options.wait) {
    console.error("ready");
    require("fs").readFileSync(0); // until the end of standard input
  }
  const start = process.hrtime.bigint();
  const result = {};
  try {
    const used = options.chain ? new ChainedTokenCredential(credential(), next) : credential();
    const got = await used.getToken(options.resource + "/.default");
    Object.assign(result, { ok: true, token: got.token, expires_on: Math.floor(got.expiresOnTimestamp / 1000) });
  } catch (e) {
    Object.assign(result, { ok: false, kind: e.name, error: e.message });
  }
  result.statuses = statuses;
  result.duration_ms = Number(process.hrtime.bigint() - start) / 1e6;
  console.log(JSON.stringify(result));
}

main();
