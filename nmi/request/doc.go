// Package request processes a token request, from the address or name of the pod to the token: it finds the pod, asks package
// identity for the decision, waits for a pending assignment, and gets the token from the cache. It reads and
// writes no HTTP messages; its errors have the HTTP status of the response.
//
// It protects against a token that the pod may not have. The decision comes before the cache. A decision that was made before
// a fetch or a wait is made again after it, because in the meantime a binding or a Secret may have changed. As long as NMI
// may lack an object, it responds with an error that makes the client retry, and never refuses permanently.
package request
