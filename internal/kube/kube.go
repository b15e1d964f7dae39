// Package kube contains what NMI and MIC both need to work with the API server: client configuration, REST clients that
// know few types, functions for informers whose objects are trimmed to what is read, and a function that reports
// whether an error means that the API server cannot respond. It protects the memory of the node: a client for all of
// Kubernetes and whole objects would take several times the memory.
package kube

import (
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Config returns the client configuration of the kubeconfig file, or of the pod's ServiceAccount if kubeconfig is "".
func Config(kubeconfig, userAgent string) (*rest.Config, error) {
	find := rest.InClusterConfig
	if kubeconfig != "" {
		find = func() (*rest.Config, error) { return clientcmd.BuildConfigFromFlags("", kubeconfig) }
	}
	config, err := find()
	if err != nil {
		return nil, fmt.Errorf("reading the address of the API server and the credentials: %w; run the program in a pod, or give a valid file with --kubeconfig", err)
	}
	config.UserAgent = userAgent
	return config, nil
}

// Client returns a client for the resources of one group and version. path is /api or /apis. The client sends bodies as
// contentType, and accepts contentType and JSON. The scheme needs to know only the types that the client sends and
// receives: a client for all of Kubernetes would take several times the memory.
func Client(config *rest.Config, scheme *runtime.Scheme, gv schema.GroupVersion, path, contentType string) (rest.Interface, error) {
	c := rest.CopyConfig(config)
	c.GroupVersion, c.APIPath = &gv, path
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	c.ContentType, c.AcceptContentTypes = contentType, contentType+","+runtime.ContentTypeJSON
	return rest.RESTClientFor(c)
}
