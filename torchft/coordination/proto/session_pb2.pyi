from torchft.coordination.proto import torchft_pb2 as _torchft_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("replica_id", "group_rank", "life_address", "active", "epoch", "unreached")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_RANK_FIELD_NUMBER: _ClassVar[int]
    LIFE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UNREACHED_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    group_rank: int
    life_address: str
    active: bool
    epoch: int
    unreached: int
    def __init__(self, replica_id: _Optional[str] = ..., group_rank: _Optional[int] = ..., life_address: _Optional[str] = ..., active: bool = ..., epoch: _Optional[int] = ..., unreached: _Optional[int] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Leave(_message.Message):
    __slots__ = ("reason", "step")
    REASON_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    reason: str
    step: int
    def __init__(self, reason: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("replica_id", "cause")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    cause: str
    def __init__(self, replica_id: _Optional[str] = ..., cause: _Optional[str] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("request_id", "member")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    member: _torchft_pb2.QuorumMember
    def __init__(self, request_id: _Optional[int] = ..., member: _Optional[_Union[_torchft_pb2.QuorumMember, _Mapping]] = ...) -> None: ...

class Withdraw(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    def __init__(self, request_id: _Optional[int] = ...) -> None: ...

class SessionUp(_message.Message):
    __slots__ = ("hello", "beat", "leave", "report", "ready", "withdraw")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    beat: Beat
    leave: Leave
    report: Report
    ready: Ready
    withdraw: Withdraw
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., withdraw: _Optional[_Union[Withdraw, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("life_address", "heartbeat_timeout_ms", "join_timeout_ms", "epoch")
    LIFE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    JOIN_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    life_address: str
    heartbeat_timeout_ms: int
    join_timeout_ms: int
    epoch: int
    def __init__(self, life_address: _Optional[str] = ..., heartbeat_timeout_ms: _Optional[int] = ..., join_timeout_ms: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Redirect(_message.Message):
    __slots__ = ("leader",)
    LEADER_FIELD_NUMBER: _ClassVar[int]
    leader: str
    def __init__(self, leader: _Optional[str] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("replica_id", "cause", "quorum_id", "step", "lives")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    QUORUM_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LIVES_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    cause: str
    quorum_id: int
    step: int
    lives: bool
    def __init__(self, replica_id: _Optional[str] = ..., cause: _Optional[str] = ..., quorum_id: _Optional[int] = ..., step: _Optional[int] = ..., lives: bool = ...) -> None: ...

class Left(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Answer(_message.Message):
    __slots__ = ("request_id", "quorum", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    quorum: _torchft_pb2.Quorum
    error: str
    def __init__(self, request_id: _Optional[int] = ..., quorum: _Optional[_Union[_torchft_pb2.Quorum, _Mapping]] = ..., error: _Optional[str] = ...) -> None: ...

class SessionDown(_message.Message):
    __slots__ = ("welcome", "notice", "left", "answer", "redirect")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REDIRECT_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    notice: Notice
    left: Left
    answer: Answer
    redirect: Redirect
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., left: _Optional[_Union[Left, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., redirect: _Optional[_Union[Redirect, _Mapping]] = ...) -> None: ...

class ReportAnswer(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: bool = ...) -> None: ...
