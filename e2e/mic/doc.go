// Package mic tests the controller of standard mode as a black box: random sequences of events and faults, a crash at
// every step, and each promise by name. It runs the controller's own code over HTTP against an API server in memory
// and the stand-in ARM, without sockets and in faked time, so that minutes of waiting cost nothing.
//
// What it protects against: an identity taken from a machine where a pod uses it, an identity touched that is none of
// ours, and anything lost or left behind, whatever fails and whenever.
package mic
