// Package request processes a token request, from the address or name of the pod to the token: it finds the pod, asks package
// identity for the decision, waits for a pending assignment, and gets the token from the cache. It reads and
// writes no HTTP messages; its errors have the HTTP status of the response.
//
// It protects against a token that the pod may not have. The decision comes before the cache. A decision that was made before
// a fetch or a wait is made again after it, because in the meantime a binding or a Secret may have changed. Before the
// caches have synced, and while a watch is stale, NMI may lack an object. Then a decision other than "granted" becomes an
// error that makes the client retry, not a permanent refusal. The watches of Secrets never count as stale.
package request
