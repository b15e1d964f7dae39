// Package request processes a token request, from the address or name of the pod to the token: it finds the pod, asks
// package identity for the decision, waits for a pending assignment, and gets the token from the cache. It reads and
// writes no HTTP messages; its errors have the HTTP status of the response.
//
// It prevents a pod from getting a token that the pod may not have. The decision comes before the cache. After a fetch
// or a wait the decision is made again, because a binding or a Secret may have changed during that time.
//
// It also prevents a refusal whose only cause is that NMI has not received an object yet: clients do not retry a
// refusal. Before the caches have synced, it makes no decision, and the response is an error that makes the client
// retry. While a watch is stale, a decision other than "granted" becomes such an error. The watches of Secrets never
// count as stale.
package request
