from torchft.coordination.proto import torchft_pb2 as _torchft_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("replica_id", "group_rank", "life_address", "active", "standing", "announced", "epoch", "unreached")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_RANK_FIELD_NUMBER: _ClassVar[int]
    LIFE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UNREACHED_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    group_rank: int
    life_address: str
    active: bool
    standing: bool
    announced: Announcement
    epoch: int
    unreached: int
    def __init__(self, replica_id: _Optional[str] = ..., group_rank: _Optional[int] = ..., life_address: _Optional[str] = ..., active: bool = ..., standing: bool = ..., announced: _Optional[_Union[Announcement, _Mapping]] = ..., epoch: _Optional[int] = ..., unreached: _Optional[int] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("quorum_id", "replica_rank", "size", "step", "stands")
    QUORUM_ID_FIELD_NUMBER: _ClassVar[int]
    REPLICA_RANK_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STANDS_FIELD_NUMBER: _ClassVar[int]
    quorum_id: int
    replica_rank: int
    size: int
    step: int
    stands: bool
    def __init__(self, quorum_id: _Optional[int] = ..., replica_rank: _Optional[int] = ..., size: _Optional[int] = ..., step: _Optional[int] = ..., stands: bool = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("request_id", "member", "init_sync", "uses")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    INIT_SYNC_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    member: _torchft_pb2.QuorumMember
    init_sync: bool
    uses: int
    def __init__(self, request_id: _Optional[int] = ..., member: _Optional[_Union[_torchft_pb2.QuorumMember, _Mapping]] = ..., init_sync: bool = ..., uses: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("change", "step")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    change: int
    step: int
    def __init__(self, change: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Withdraw(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    def __init__(self, request_id: _Optional[int] = ...) -> None: ...

class SessionUp(_message.Message):
    __slots__ = ("hello", "beat", "leave", "report", "ready", "withdraw", "ack", "drain")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    beat: Beat
    leave: Leave
    report: Report
    ready: Ready
    withdraw: Withdraw
    ack: Ack
    drain: Drain
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., withdraw: _Optional[_Union[Withdraw, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("life_address", "heartbeat_timeout_ms", "join_timeout_ms", "lease_ms", "quorum_id", "epoch")
    LIFE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    JOIN_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    QUORUM_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    life_address: str
    heartbeat_timeout_ms: int
    join_timeout_ms: int
    lease_ms: int
    quorum_id: int
    epoch: int
    def __init__(self, life_address: _Optional[str] = ..., heartbeat_timeout_ms: _Optional[int] = ..., join_timeout_ms: _Optional[int] = ..., lease_ms: _Optional[int] = ..., quorum_id: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Redirect(_message.Message):
    __slots__ = ("leader",)
    LEADER_FIELD_NUMBER: _ClassVar[int]
    leader: str
    def __init__(self, leader: _Optional[str] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("replica_id", "cause", "quorum_id", "step", "lives", "since")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    QUORUM_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LIVES_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    cause: str
    quorum_id: int
    step: int
    lives: bool
    since: int
    def __init__(self, replica_id: _Optional[str] = ..., cause: _Optional[str] = ..., quorum_id: _Optional[int] = ..., step: _Optional[int] = ..., lives: bool = ..., since: _Optional[int] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("views", "fenced", "stands")
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    STANDS_FIELD_NUMBER: _ClassVar[int]
    views: _containers.RepeatedCompositeFieldContainer[_torchft_pb2.ManagerQuorumResponse]
    fenced: bool
    stands: bool
    def __init__(self, views: _Optional[_Iterable[_Union[_torchft_pb2.ManagerQuorumResponse, _Mapping]]] = ..., fenced: bool = ..., stands: bool = ...) -> None: ...

class Heard(_message.Message):
    __slots__ = ("number", "quorum_id")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    QUORUM_ID_FIELD_NUMBER: _ClassVar[int]
    number: int
    quorum_id: int
    def __init__(self, number: _Optional[int] = ..., quorum_id: _Optional[int] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("change", "quorum_id")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    QUORUM_ID_FIELD_NUMBER: _ClassVar[int]
    change: int
    quorum_id: int
    def __init__(self, change: _Optional[int] = ..., quorum_id: _Optional[int] = ...) -> None: ...

class Decide(_message.Message):
    __slots__ = ("change", "quorum_id", "step")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    QUORUM_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    change: int
    quorum_id: int
    step: int
    def __init__(self, change: _Optional[int] = ..., quorum_id: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Over(_message.Message):
    __slots__ = ("quorum_id", "cause")
    QUORUM_ID_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    quorum_id: int
    cause: str
    def __init__(self, quorum_id: _Optional[int] = ..., cause: _Optional[str] = ...) -> None: ...

class Left(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Answer(_message.Message):
    __slots__ = ("request_id", "quorum", "error", "grant", "go_on")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    GO_ON_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    quorum: _torchft_pb2.Quorum
    error: str
    grant: Grant
    go_on: int
    def __init__(self, request_id: _Optional[int] = ..., quorum: _Optional[_Union[_torchft_pb2.Quorum, _Mapping]] = ..., error: _Optional[str] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., go_on: _Optional[int] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ("why",)
    WHY_FIELD_NUMBER: _ClassVar[int]
    why: str
    def __init__(self, why: _Optional[str] = ...) -> None: ...

class SessionDown(_message.Message):
    __slots__ = ("welcome", "notice", "left", "answer", "heard", "prepare", "decide", "over", "waiting", "redirect")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    HEARD_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    DECIDE_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    REDIRECT_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    notice: Notice
    left: Left
    answer: Answer
    heard: Heard
    prepare: Prepare
    decide: Decide
    over: Over
    waiting: Waiting
    redirect: Redirect
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., left: _Optional[_Union[Left, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., heard: _Optional[_Union[Heard, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., decide: _Optional[_Union[Decide, _Mapping]] = ..., over: _Optional[_Union[Over, _Mapping]] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ..., redirect: _Optional[_Union[Redirect, _Mapping]] = ...) -> None: ...

class ReportAnswer(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: bool = ...) -> None: ...
