package azure

import (
	"net/http"
	"strconv"
	"strings"
)

// armError is an error in the format of Resource Manager.
type armError struct {
	Status  int        `json:"-"`
	Code    string     `json:"code"`
	Message string     `json:"message"`
	Target  string     `json:"target,omitempty"`
	Details []armError `json:"details,omitempty"`
}

// refuse returns an error response and logs its code.
func (x *armRequestContext) refuse(e *armError) response {
	x.entry.Code = e.Code
	out := jsonResponse(e.Status, map[string]*armError{"error": e})
	out.header = map[string]string{}
	return out
}

func notFound(c computeID) *armError {
	return &armError{Status: http.StatusNotFound, Code: "ResourceNotFound", Message: "The Resource 'Microsoft.Compute/" + c.resourceType + "/" + c.name +
		"' under resource group '" + c.resourceGroup + "' was not found. For more details please go to https://aka.ms/ARMResourceNotFoundFix"}
}

// addRetryAfter adds the Retry-After header to a response.
func (s ARMSettings) addRetryAfter(out response) {
	if s.RetryAfter > 0 {
		out.header["Retry-After"] = strconv.Itoa(s.RetryAfter)
	}
}

// armResource is the body of the responses to GET and PATCH: a machine.
type armResource struct {
	Name       string         `json:"name"`
	ID         string         `json:"id"`
	Type       string         `json:"type"`
	Location   string         `json:"location"`
	ETag       string         `json:"etag,omitempty"`
	SKU        map[string]any `json:"sku,omitempty"`
	Identity   *armIdentity   `json:"identity,omitempty"` // absent if the machine has none
	Properties map[string]any `json:"properties"`
}

type armIdentity struct {
	Type                   string                 `json:"type"`
	PrincipalID            string                 `json:"principalId,omitempty"`
	TenantID               string                 `json:"tenantId,omitempty"`
	UserAssignedIdentities map[string]armAssigned `json:"userAssignedIdentities,omitempty"`
}

type armAssigned struct {
	PrincipalID string `json:"principalId"`
	ClientID    string `json:"clientId"`
}

// describe returns a response with the machine. Its identities are the current ones
// or, with the setting Early, those after all its operations.
func (a *ARM) describe(m *armMachine) response {
	doc := armResource{
		Name: m.name, ID: m.id, Type: "Microsoft.Compute/" + m.resourceType, Location: a.o.Location,
		Properties: map[string]any{"provisioningState": m.provisioningState()},
	}
	if m.kind == KindVMSS {
		doc.SKU = map[string]any{"name": "Standard_D2s_v5", "tier": "Standard", "capacity": 3}
		doc.Properties["orchestrationMode"], doc.Properties["uniqueId"] = "Uniform", derivedGUID(m.key())
	} else {
		doc.Properties["hardwareProfile"] = map[string]string{"vmSize": "Standard_D2s_v5"}
		doc.Properties["vmId"] = derivedGUID(m.key())
	}
	set := m.set
	if a.settings.Early {
		set = m.projected()
	}
	doc.Identity = a.identityOf(set)
	header := map[string]string{}
	if !a.settings.NoETags {
		doc.ETag, header["ETag"] = m.etag(), m.etag()
	}
	out := jsonResponse(http.StatusOK, doc)
	out.header = header
	return out
}

func (a *ARM) identityOf(set identitySet) *armIdentity {
	var types []string
	out := &armIdentity{}
	if set.system != nil {
		types = append(types, "SystemAssigned")
		out.PrincipalID, out.TenantID = set.system.ObjectID, set.system.TenantID
		if out.TenantID == "" {
			out.TenantID = a.o.Tenant
		}
	}
	if len(set.user) > 0 {
		types = append(types, "UserAssigned")
		out.UserAssignedIdentities = map[string]armAssigned{}
		casing := a.settings.Casing
		if casing == CasingChanging {
			casing = casings[a.responses%(len(casings)-1)]
			a.responses++
		}
		for _, at := range set.user {
			out.UserAssignedIdentities[casing.apply(at.asSent)] = armAssigned{at.identity.ObjectID, at.identity.ClientID}
		}
	}
	if types == nil {
		return nil
	}
	out.Type = strings.Join(types, ", ")
	return out
}

func (c Casing) apply(id string) string {
	switch c {
	case CasingLower:
		return strings.ToLower(id)
	case CasingUpper:
		return strings.ToUpper(id)
	case CasingResourcegroups:
		segments := strings.Split(id, "/")
		if len(segments) > 3 {
			segments[3] = "resourcegroups"
		}
		return strings.Join(segments, "/")
	}
	return id
}

const armTime = "2006-01-02T15:04:05.0000000+00:00"

// poll returns a response with the status of an operation.
func (a *ARM) poll(x *armRequestContext, o *armOperation) response {
	doc := struct {
		Start  string    `json:"startTime"`
		End    string    `json:"endTime,omitempty"`
		Status string    `json:"status"`
		Error  *armError `json:"error,omitempty"`
		Name   string    `json:"name"`
	}{Start: o.start.UTC().Format(armTime), Status: "InProgress", Name: o.id}
	if o.ended {
		doc.End, doc.Status = o.end.UTC().Format(armTime), "Succeeded"
		if doc.Error = o.failure; doc.Error != nil {
			doc.Status, x.entry.Code = "Failed", doc.Error.Code
		}
	}
	out := jsonResponse(http.StatusOK, doc)
	out.header = map[string]string{}
	if !o.ended {
		a.settings.addRetryAfter(out)
	}
	return out
}
