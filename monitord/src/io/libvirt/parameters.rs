//! libvirt's typed parameters: name and value, in arrays that libvirt allocates and must free itself.
#![allow(unsafe_code)]

use super::sys::{Failure, check, text};
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::{fmt, ptr};
use virt::sys;

/// A typed parameter's value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(String),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signed(value) => value.fmt(f),
            Self::Unsigned(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

/// Name and value.
pub(super) type Parameter = (String, Value);

/// The whole number called `name`.
pub(super) fn number(parameters: &[Parameter], name: &str) -> Option<u64> {
    parameters.iter().find(|(key, _)| key == name).and_then(|(_, value)| match value {
        Value::Unsigned(value) => Some(*value),
        Value::Signed(value) => u64::try_from(*value).ok(),
        Value::Float(_) | Value::Text(_) => None,
    })
}

/// An array that libvirt allocated and libvirt frees.
pub(super) struct Parameters {
    pub(super) list: sys::virTypedParameterPtr,
    pub(super) count: c_int,
    room: c_int,
}

impl Default for Parameters {
    fn default() -> Self {
        Self { list: ptr::null_mut(), count: 0, room: 0 }
    }
}

impl Parameters {
    pub(super) fn add(&mut self, name: &CStr, value: &Value) -> Result<(), Failure> {
        let (list, count, room) = (&raw mut self.list, &raw mut self.count, &raw mut self.room);
        // SAFETY: the three describe one array of libvirt's making; names and texts are copied by it.
        check(unsafe {
            match value {
                Value::Signed(value) => sys::virTypedParamsAddLLong(list, count, room, name.as_ptr(), *value),
                Value::Unsigned(value) => sys::virTypedParamsAddULLong(list, count, room, name.as_ptr(), *value),
                Value::Float(value) => sys::virTypedParamsAddDouble(list, count, room, name.as_ptr(), *value),
                Value::Text(value) => {
                    let value = text(value)?;
                    sys::virTypedParamsAddString(list, count, room, name.as_ptr(), value.as_ptr())
                }
            }
        })
    }

    pub(super) fn read(&self) -> Vec<Parameter> {
        // SAFETY: the array holds `count` parameters.
        unsafe { read(self.list, self.count) }
    }
}

impl Drop for Parameters {
    fn drop(&mut self) {
        // SAFETY: allocated by libvirt or NULL, freed once, texts inside included.
        unsafe { sys::virTypedParamsFree(self.list, self.count) };
    }
}

/// Copies parameters.
///
/// # Safety
/// `list` must hold `count` valid parameters, or `count` be at most 0.
pub(super) unsafe fn read(list: sys::virTypedParameterPtr, count: c_int) -> Vec<Parameter> {
    let mut found = Vec::new();
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: `at` is below the count promised; `type_` says which member of the union is set.
        unsafe {
            let parameter = &*list.add(at);
            let name = CStr::from_ptr(parameter.field.as_ptr().cast::<c_char>()).to_string_lossy().into_owned();
            let value = match parameter.type_.cast_unsigned() as c_uint {
                sys::VIR_TYPED_PARAM_INT => Value::Signed(parameter.value.i.into()),
                sys::VIR_TYPED_PARAM_UINT => Value::Unsigned(parameter.value.ui.into()),
                sys::VIR_TYPED_PARAM_LLONG => Value::Signed(parameter.value.l),
                sys::VIR_TYPED_PARAM_ULLONG => Value::Unsigned(parameter.value.ul),
                sys::VIR_TYPED_PARAM_DOUBLE => Value::Float(parameter.value.d),
                sys::VIR_TYPED_PARAM_BOOLEAN => Value::Unsigned(u64::from(parameter.value.b != 0)),
                sys::VIR_TYPED_PARAM_STRING if !parameter.value.s.is_null() => {
                    Value::Text(CStr::from_ptr(parameter.value.s).to_string_lossy().into_owned())
                }
                _ => continue,
            };
            found.push((name, value));
        }
    }
    found
}
